"""How W is kept and merged: W + B P^T in fp32, rounded once; fp32 masters; outer momentum."""

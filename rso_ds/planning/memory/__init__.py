"""What training needs in memory: modelled before it runs, measured while it runs."""

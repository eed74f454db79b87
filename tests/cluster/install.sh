#!/usr/bin/env bash
# What the virtual cluster needs, from Debian's or Ubuntu's packages; root only.
set -euo pipefail
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
    slurm-wlm munge pdsh openssh-server openssh-client openmpi-bin iproute2 util-linux

#!/usr/bin/env bash
# Installs the Debian packages that kvfs and its tests need, those that are missing only.
set -euo pipefail

packages=(
  gcc libc6-dev make pkg-config # pyfuse3 and the compile test build C
  python3-dev python3-venv
  fuse3 libfuse3-dev            # the mount
  attr fio git rsync sqlite3    # programs that the tests run on a mount
  iproute2 nftables util-linux  # hosts of their own, and the links between them, for tests
)

missing=()
for package in "${packages[@]}"; do
  status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
  [ "$status" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || {
    echo "kvfs: missing packages: ${missing[*]}; run as root: apt-get install ${missing[*]}" >&2
    exit 1
  }
  as_root=(sudo)
fi
command -v apt-get >/dev/null || {
  echo "kvfs: this is no Debian; install the equivalents of: ${missing[*]}" >&2
  exit 1
}

install() {
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -q --no-install-recommends "${missing[@]}" </dev/null
}

echo "kvfs: installing ${missing[*]}"
# The package lists of a fresh machine are empty or old: fetch them only if it fails without.
if ! install >/dev/null 2>&1; then
  "${as_root[@]}" apt-get update -q </dev/null
  install
fi

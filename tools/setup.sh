#!/usr/bin/env bash
# Set-up of a Debian machine for Hotcell: Debian packages, then a Python environment in .venv from the
# hash-locked requirements. Safe to repeat; when nothing changed it ends in well under a second.
# Uses the machine's own apt and pip configuration and no other source.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
  qemu-system-x86 qemu-utils           # the machines and their disks
  ovmf                                 # UEFI firmware, for machines with passed-through devices
  libvirt-daemon-driver-qemu           # libvirt's QEMU driver, run inside our own process
  libvirt-dev pkg-config gcc libc6-dev python3-dev # libvirt-python is built from source
  python3-venv
  mmdebstrap e2fsprogs                 # root trees of images, and their file systems
  nftables iproute2 tcpdump            # the cell's network, its rules, its capture
  openssh-client                       # key pairs of a cell's machines
  curl                                 # unit tests run the controls' scripts on the host
  shellcheck                           # make check
)
lock=requirements/appliance.lock
stamp=.venv/hotcell-setup
log=$(mktemp /tmp/hotcell-setup.XXXXXX.log)
trap 'rm -f "$log"' EXIT

die() {
  printf 'setup: %s\n' "$1" >&2
  [ -z "${2:-}" ] || printf '  what to do: %s\n' "$2" >&2
  exit 1
}

# step NAME COMMAND...: runs quietly, prints how long it took, shows the end of the output if it fails
step() {
  local name=$1 start=$SECONDS
  shift
  printf 'setup: %s ...\n' "$name"
  if ! "$@" >"$log" 2>&1; then
    tail -n 25 "$log" >&2
    return 1
  fi
  printf 'setup: %s: %d s\n' "$name" $((SECONDS - start))
}

missing_packages() {
  local p
  for p in "${packages[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true)" = installed ] || printf '%s\n' "$p"
  done
}

fingerprint() {
  { python3 -VV; pwd; cat tools/setup.sh "$lock" pyproject.toml; } | sha256sum | cut -d' ' -f1
}

command -v apt-get >/dev/null ||
  die "this is not a Debian system (no apt-get)" "use Debian 12 or 13, or install the packages named in tools/setup.sh by hand"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  die "Python 3.11 or newer is needed, found $(python3 -V 2>&1 || echo none)" "apt-get install python3 on Debian 12 or newer"

mapfile -t missing < <(missing_packages)
if [ "${#missing[@]}" -eq 0 ] && [ "$(cat "$stamp" 2>/dev/null || true)" = "$(fingerprint)" ]; then
  exit 0
fi
[ "$(id -u)" -eq 0 ] || die "root is needed to install packages and to run machines" "run it again as root"

mkdir -p .venv
exec 9>.venv/setup.lock
flock -n 9 || { echo "setup: another set-up of this folder is running, waiting for it"; flock 9; }

if [ "${#missing[@]}" -gt 0 ]; then
  export DEBIAN_FRONTEND=noninteractive
  apt=(apt-get -q -y -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300)
  step "package lists" "${apt[@]}" update ||
    die "the package lists could not be fetched" "check apt's sources and the network: apt-get update"
  step "${#missing[@]} Debian packages (${missing[*]})" "${apt[@]}" install --no-install-recommends "${missing[@]}" ||
    die "Debian packages could not be installed" "see the messages above; then run make setup again"
fi

# libvirt resolves its default user while it reads the configuration that replaces it; the package that
# would create it also brings a daemon, which is not wanted here.
getent passwd libvirt-qemu >/dev/null ||
  step "system user libvirt-qemu" useradd --system --user-group --no-create-home --home-dir /var/lib/libvirt \
    --shell /usr/sbin/nologin libvirt-qemu || die "the system user libvirt-qemu could not be created"

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  step "Python environment in .venv" python3 -m venv .venv ||
    die "the Python environment could not be made" "remove .venv and run make setup again"
fi
pip=(.venv/bin/python -m pip --disable-pip-version-check --no-input)
# The lock is complete, so nothing is resolved; byte code is made when first needed, which halves the work.
step "Python packages from $lock" "${pip[@]}" install --no-deps --no-compile --require-hashes -r "$lock" ||
  die "Python packages could not be installed" "check pip's index and the network: $(pwd)/.venv/bin/python -m pip config list"
step "hotcell itself" "${pip[@]}" install --no-build-isolation --no-deps -e . ||
  die "hotcell could not be installed into .venv" "see the messages above"
fingerprint >"$stamp"
echo "setup: done, the command is .venv/bin/hotcell"

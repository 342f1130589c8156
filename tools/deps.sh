#!/usr/bin/env bash
# Installs what a task needs from Debian (bookworm or later), and nothing that is there already: with everything in
# place it needs no network and no root.
#   tools/deps.sh              everything: build, test, lint
#   tools/deps.sh build        only what the library and the command need
#   tools/deps.sh fuzz         what tests/campaign/fuzz needs beside these, and
#   tools/deps.sh emulate      tests/campaign/emulated
set -euo pipefail

build="build-essential cmake pkgconf liblmdb-dev libfaiss-dev libopenblas-dev libxxhash-dev libpcre2-dev libjansson-dev liburing-dev"
test="libcmocka-dev gnuplot-nox"
lint="clang-format clang-tidy"
fuzz="clang libclang-rt-dev"
emulate="bochs bochs-term bochsbios vgabios isolinux syslinux-common xorriso cpio busybox-static"

[ $# -gt 0 ] || set -- build test lint
wanted=
for group in "$@"; do
    case $group in
    build) wanted+=" $build" ;;
    test) wanted+=" $test" ;;
    lint) wanted+=" $lint" ;;
    fuzz) wanted+=" $fuzz" ;;
    emulate) wanted+=" $emulate" ;;
    *) echo "deps: no group '$group'; there are: build test lint fuzz emulate" >&2 && exit 2 ;;
    esac
done

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    echo "deps: this is not Debian; going on with what is here. Debian's names of what is needed:$wanted" >&2
    exit 0
fi

missing=
for package in $wanted; do
    state=$(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null) || state=
    case $state in ii* | hi*) ;; *) missing+=" $package" ;; esac
done
if [ -z "$missing" ]; then
    echo "deps: all packages are installed" >&2
    exit 0
fi

root=
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "deps: missing:$missing. Install them as root, then run this again" >&2; exit 1; }
    root="sudo"
fi
echo "deps: installing$missing" >&2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
quietly() { "$@" >"$log" 2>&1 || { cat "$log" >&2; echo "deps: '$*' failed" >&2; exit 1; }; }
quietly $root apt-get -q -o DPkg::Lock::Timeout=300 update
# shellcheck disable=SC2086  # a list of packages
quietly $root env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 install --no-install-recommends $missing

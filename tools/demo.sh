#!/usr/bin/env bash
# Shows what Cairn does, on real text: hides one sentence with a five-digit pass key somewhere in a book, has the book
# read once into a store on disk, then asks for the key in a new process with little memory, from a cold disk. Installs
# and builds what is missing first. Needs two or three minutes on two cores, and no network beyond Debian's packages.
#   tools/demo.sh [--bytes N] [--seed N] [--ram SIZE] [--keep]
#     --bytes N    length of the text, one byte is one token (300000)
#     --seed N     chooses the key and its place (random, and printed)
#     --ram SIZE   memory budget of the process that asks (32M)
#     --keep       leaves text and store behind and says where
set -euo pipefail
cd "$(dirname "$0")/.."

bytes=300000 seed= ram=32M keep=
while [ $# -gt 0 ]; do
    case $1 in
    --keep) keep=yes && shift && continue ;;
    --bytes | --seed | --ram) [ $# -ge 2 ] || { echo "demo: $1 needs a value" >&2; exit 2; } ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
    esac
    case $1 in --bytes) bytes=$2 ;; --seed) seed=$2 ;; --ram) ram=$2 ;; esac
    shift 2
done
[ -n "$seed" ] || seed=$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')
case $bytes$seed in *[!0-9]*) echo "demo: --bytes and --seed are whole numbers" >&2; exit 2 ;; esac

say() { printf '\n== %s\n' "$*"; }
model=models/cairn-tiny-f16.gguf
dir=$(mktemp -d "${TMPDIR:-/tmp}/cairn-demo.XXXXXX")
done_with() { if [ -n "$keep" ]; then echo "kept: $dir"; else rm -rf "$dir"; fi; }
trap done_with EXIT

say "packages and build"
tools/deps.sh build
if [ -f build/CMakeCache.txt ]; then cmake -S . -B build >"$dir/log" 2>&1; else
    cmake -S . -B build -DCMAKE_BUILD_TYPE=Release -DCAIRN_TESTS=OFF >"$dir/log" 2>&1
fi && cmake --build build -j "$(nproc)" --target cairn_command >>"$dir/log" 2>&1 || { tail -n 30 "$dir/log"; exit 1; }
cairn=build/cairn
"$cairn" --version

# Key and place follow from the seed: the key is any five digits, the place the start of the line after any byte.
number() { printf '%s %s' "$1" "$seed" | sha256sum | awk '{ print substr($1, 1, 12) }'; }
key=$(printf '%05d' $((0x$(number key) % 100000)))
sentence=$(printf '\nThe pass key is %s. Remember it. %s is the pass key.\n.' "$key" "$key")
sentence=${sentence%.} # $(...) would have taken the last newline away
[ "$bytes" -gt 1000 ] || { echo "demo: --bytes $bytes is no book" >&2; exit 2; }

say "a text of $bytes bytes, with one sentence hidden in it (--seed $seed)"
tools/text.sh $((bytes - ${#sentence})) 2000000 >"$dir/book" # a dictionary: the Jargon File before it is full of digits
place=$((0x$(number place) % (bytes - ${#sentence} - 200)))
place=$((place + $(tail -c "+$((place + 1))" "$dir/book" | { head -n 1; cat >/dev/null; } | wc -c)))
{ head -c "$place" "$dir/book"; printf '%s' "$sentence"; tail -c "+$((place + 1))" "$dir/book"; } >"$dir/text"
rm "$dir/book"
[ "$(stat -c %s "$dir/text")" = "$bytes" ] && [ "$(grep -ac "The pass key is" "$dir/text")" = 1 ]
echo "at byte $place, $((place * 100 / bytes)) % of the way:"
grep -a -B 3 -A 4 "The pass key is" "$dir/text" | sed 's/^/    | /'

say "read once: cairn ingest"
"$cairn" ingest "$dir/store" -m $model -c book "$dir/text" --progress
store_bytes=$(du -sB1 "$dir/store" | cut -f1)

say "asked, in a new process, the store gone from the page cache, budget $ram: cairn ask"
question='
What is the pass key? The pass key is '
for file in "$dir"/store/data-*/data.mdb "$dir"/store/index/*; do
    [ ! -f "$file" ] || dd if="$file" iflag=nocache count=0 status=none
done
began=$(date +%s%N)
"$cairn" ask "$dir/store" -m $model -c book --fetch read --ram "$ram" --sources --stats "$question" \
    >"$dir/answer" 2>"$dir/report" || { cat "$dir/report"; exit 1; }
took=$((($(date +%s%N) - began) / 1000000))
answer=$(tr -d '\n' <"$dir/answer")
printf 'question:  %s\n' "${question#?}"
printf 'answer:    %s\n' "$answer"
printf 'expected:  %s\n' "$key"
sed 's/^/    /' "$dir/report"
peak=$(sed -nE 's/^memory +([0-9.]+ [KMG]iB) peak.*/\1/p' "$dir/report")
echo "in short: store $((store_bytes >> 20)) MiB on disk, ${peak:-?} of memory at most, $took ms from start to end"

case $answer in
"$key"*) say "PASS: the key was found $((bytes - place)) tokens back, $((took)) ms after asking" ;;
*) say "FAIL: expected $key" && exit 1 ;;
esac

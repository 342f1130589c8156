#!/usr/bin/env bash
# Writes the text the demo model is trained on into a directory: about 90 MB of English out of Debian packages, always
# the same for the same packages, which are downloaded and read but not installed. What tools/text.sh gives (The Jargon
# File, a dictionary) is not among it: that text is for asking.
#   tools/corpus.sh DIR
set -euo pipefail
. "$(dirname "$0")/debian.sh"

[ $# = 1 ] || { sed -n '2,5s/^# //p' "$0" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cache=$cache/corpus
mkdir -p "$cache"

# package, then which of its files: an extended regular expression over their paths
sources='
anarchism            /html/.*\.html(\.gz)?$
linux-doc-6.1        /Documentation/.*\.(rst|txt)(\.gz)?$
perl-doc             \.pod$
manpages             /share/man/man[1-8]/.*\.gz$
manpages-dev         /share/man/man[1-8]/.*\.gz$
debian-handbook      /html/en-US/.*\.html$
debian-reference-en  /debian-reference/.*\.en\.html$
debian-policy        \.html$
developers-reference /developers-reference/[^/]*\.html$
fortunes             /games/fortunes/[a-z0-9-]*$
dict-foldoc          foldoc\.dict\.dz$
dict-wn              wn\.dict\.dz$
python3.11-doc       /html/(library|howto|tutorial|reference|faq|c-api|whatsnew|extending)/.*\.html$
vim-runtime          /doc/[^/]*\.txt$
git-doc              \.txt$
postgresql-doc-15    /html/.*\.html$
sqlite3-doc          \.html$
ieee-data            /ieee-data/(mam|iab|oui36)\.txt$
tzdata               /zoneinfo/(tzdata\.zi|zone1970\.tab|leap-seconds\.list)$
'

have() { [ -n "$(find "$cache" -name "$1_*.deb" -print -quit)" ]; }

tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
while read -r package pattern; do
    [ -n "$package" ] || continue
    if ! have "$package"; then
        say "downloading $package from Debian"
        fetch "$package" "$cache" || { say "$package cannot be had"; exit 1; }
    fi
    mkdir -p "$tree/$package"
    dpkg-deb --fsys-tarfile "$cache/$package"_*.deb >"$tree/tar"
    tar -tf "$tree/tar" | grep -E "$pattern" | grep -v '/$' >"$tree/list" || { say "$package has no file like $pattern"; exit 1; }
    tar -C "$tree/$package" -xf "$tree/tar" -T "$tree/list" # links among them stay links, and are left out below
done <<<"$sources"
rm -f "$tree/tar" "$tree/list"

# Documents in the order of a hash of their paths, so that every part of the corpus is a mixture, in files of 4 MB.
# Markup goes: tags and entities of HTML, requests and escapes of man pages. What is left are printable bytes, tabs and
# newlines, without blanks before a newline or two empty lines in a row.
find "$tree" -type f -printf '%P\0' | perl -0 -MDigest::MD5=md5 -MIO::Uncompress::Gunzip=gunzip -e '
    my ($tree, $out) = splice @ARGV, 0, 2;
    my %entity = (lt => "<", gt => ">", amp => "&", quot => "\"", apos => "\x27", nbsp => " ", ndash => "-", mdash => "-",
                  copy => "(c)", rsquo => "\x27", lsquo => "\x27", rdquo => "\"", ldquo => "\"", hellip => "...");
    my ($n, $bytes, $documents, $file) = (0, 0, 0);
    chomp(my @paths = <STDIN>);
    for my $path (sort { md5($a) cmp md5($b) or $a cmp $b } @paths) {
        open my $in, "<:raw", "$tree/$path" or die "$path: $!";
        local $/ = undef;
        my $text = <$in>;
        if ($path =~ /\.(gz|dz)$/) { my $plain; gunzip \$text => \$plain or next; $text = $plain }
        if ($path =~ /\.html/) {
            $text =~ s/<(script|style|head|nav)\b.*?<\/\1>//gis;
            $text =~ s/<(p|div|li|tr|h\d|br|dt|dd|pre)\b[^>]*>/\n/gi;
            $text =~ s/<[^>]*>//g;
            $text =~ s/&(\w+);/exists $entity{$1} ? $entity{$1} : " "/ge;
            $text =~ s/&#(\d+);/$1 < 127 && $1 > 31 ? chr $1 : " "/ge;
            $text =~ s/\n[ \t]+/\n/g;
            $text =~ s/\xc2\xb6//g; # pilcrow: a link to the heading it ends
        } elsif ($path =~ /\/man\d\//) {
            $text =~ s/^[.\x27]\\".*\n//gm;
            $text =~ s/^\.(\w+) ?/$1 =~ m{^(SH|SS|TH)$} ? "\n" : ""/gme;
            $text =~ s/\\f(\[\w*\]|.)|\\&|\\c|\\\||\\[ud]//g;
            $text =~ s/\\(?:\(|\[)(\w\w)\]?/$1 eq "aq" ? "\x27" : $1 eq "em" ? "-" : " "/ge;
            $text =~ s/\\([-. e\\])/$1 eq "e" ? "\\" : $1/ge;
        }
        $text =~ s/[^\t\n\x20-\x7e\x80-\xff]//g;
        $text =~ s/[ \t]+\n/\n/g;
        $text =~ s/\n{3,}/\n\n/g;
        next if length $text < 1000;
        if (!$file || $bytes > 4e6 * $n) {
            open $file, ">:raw", sprintf "%s/%03d.txt", $out, $n++ or die "$out: $!";
        }
        print $file $text, "\n\n" or die "$out: $!";
        $bytes += 2 + length $text;
        $documents++;
    }
    close $file or die "$out: $!";
    print "$documents documents, $bytes bytes in $n files\n";
' "$tree" "$out"

#!/bin/sh
# Builds the demo's program: it knows its commit, and it is as long as the file `size` says.
set -eu
commit=${SHOAL_COMMIT:-$(git rev-parse HEAD)}
size=$(cat size)
mkdir -p out
cc -O2 -s -DVERSION="\"$commit\"" -o out/server server.c
cc -O2 -o fill fill.c
./fill out/server "$size" "$commit"
rm fill
echo "built $commit: $(wc -c < out/server) bytes"

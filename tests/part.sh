#!/usr/bin/env bash
# A part of `make test`, by name: part.sh NAME COMMAND... runs it and says how long it took. `part.sh` alone prints the
# table of all parts. They are kept in the file $PARTS, one line each.
set -uo pipefail
if [ $# -eq 0 ]; then
  awk -F'\t' '{ all += $1; printf "%5d s  %s\n", $1, $2 } END { printf "%5d s  in all\n", all }' "$PARTS"
  exit
fi
name=$1
shift
echo "=== $name"
start=$SECONDS
"$@"
code=$?
taken=$((SECONDS - start))
[ $code -eq 0 ] && outcome="" || outcome=": FAILED"
echo "=== $name: $taken s$outcome"
mkdir -p "$(dirname "$PARTS")"
printf '%d\t%s\n' $taken "$name$outcome" >>"$PARTS"
exit $code

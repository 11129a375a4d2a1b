#!/bin/sh
# Stands in for the command `flea` in the test of `controller.rs`, called as
#     count -p PID ADDRESS REPORT
# Patches the last byte of the 5-byte nop at ADDRESS (decimal), a nop still; at SIGTERM takes
# that back and prints REPORT. With the subcommand `refuse`, says why and fails.
if [ "$1" = refuse ]; then
    echo "cannot attach: no reason" >&2
    exit 1
fi
mem=/proc/$3/mem
at=$(($4 + 4))
report=$5
poke() {
    printf "$1" | dd of="$mem" bs=1 seek="$at" conv=notrunc 2>/dev/null
}
trap 'poke "\000"; echo "$report"; exit 0' TERM
poke '\010'
while :; do sleep 0.05; done

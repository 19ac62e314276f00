#!/usr/bin/env bash
# Shows that the tests of the promise can fail: takes one rule after the other out of a copy of the service
# and runs what must notice, a phase or two of TestPromise, or, for rules that close a gap of milliseconds,
# the test in cache_test.go that holds the gap open. Exits 1 when one goes unnoticed.
# Usage: ./scripts/mutants.sh [NAME...]; PROMISE is about how many reads the phases of the whole test would make.
# shellcheck disable=SC2016 # the dollars are for perl
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/lib.sh

need_servers
have perl || die 'perl is needed'

copy=$(mktemp -d)
chmod 711 "$copy" # for the user that PostgreSQL runs as
export TEST_DIR=$copy/state POSTGRES_ARGS='-c fsync=off' PROMISE=${PROMISE:-40000}

finish() {
  remove_servers "$TEST_DIR"
  rm -rf "$copy"
}
trap finish EXIT

private_servers "$TEST_DIR"

wanted=" $* " survivors=0
printf '%-22s %-22s %12s  %s\n' 'rule taken out' 'noticed by' 'stale reads' 'seconds'

# mutant NAME TESTS PERL: PERL must change cache.go. TESTS are phases, or the name of a test.
mutant() {
  local name=$1 tests=$2 began=$SECONDS output stale
  [[ $tests == Test* ]] || tests="TestPromise/^($tests)\$"
  if [[ $wanted != '  ' && $wanted != *" $name "* ]]; then return; fi
  output=$copy/$name.log
  rm -rf "$copy/tree"
  mkdir -p "$copy/tree/scripts"
  cp ./*.go go.mod go.sum schema.sql "$copy/tree/"
  cp scripts/lib.sh "$copy/tree/scripts/"
  perl -0pi -e "$3" "$copy/tree/cache.go"
  if cmp -s cache.go "$copy/tree/cache.go"; then die "mutant $name: its pattern does not match cache.go any more"; fi
  (cd "$copy/tree" && go vet . && go test -count=1 -timeout 300s -v -run "$tests" .) >"$output" 2>&1 || true
  stale=$(awk '$1 == "total" { n += $(NF - 2); ran = 1 } /cache_test.go:/ { n++; ran = 1 } END { if (ran) print n + 0 }' "$output")
  printf '%-22s %-22s %12s  %7d\n' "$name" "$2" "${stale:-no result}" "$((SECONDS - began))"
  if [[ -z $stale ]]; then tail -n 20 "$output"; fi
  if ((${stale:-0} == 0)); then survivors=$((survivors + 1)); fi
}

mutant no-lease-check 'calm|clear' \
  's/\n[^\n]*~= token then return end//'
mutant no-writers-mark 'calm|clear' \
  's/\n[^\n]*redis\.call\(.ZADD.[^\n]*//'
mutant no-deletion-before 'calm|killed' \
  's/(redis\.call\(.ZADD.[^\n]*)\n[^\n]*redis\.call\(.DEL.[^\n]*/$1/'
mutant no-deletion-after 'calm|clear' \
  's/(redis\.call\(.ZREM.[^\n]*)\n[^\n]*redis\.call\(.DEL.[^\n]*/$1/'
mutant singleflight 'calm|clear' \
  's/case running\.next == nil:\s+running\.next = mine\s+default:\s+mine = running\.next/default:\nmine = running/'
mutant no-run-id-check 'TestOldSnapshot' \
  's/\n[^\n]*c\.distrust\(errors\.New\("another redis[^\n]*//'
mutant no-loss-of-trust 'silent' \
  's/c\.distrust\(err\)/_ = err/g'
mutant no-listener 'psql|bulk' \
  's/(range c\.listener\.Notify \{)/$1\nif n != nil { continue }/'
mutant deaf-but-trusting 'postgres' \
  's/\n[^\n]*c\.distrust\(fmt\.Errorf\("the listener lost[^\n]*//; s/if listenerErr != nil \{/if false {/'
mutant no-notify-when-cut 'TestWriteWithoutRedis' \
  's/if !announced \{/if false {/'
mutant first-write-unmarked 'TestFirstWrite' \
  's/\n[^\n]*c\.reachable\.Store\(true\)[^\n]*//'

if ((survivors > 0)); then
  printf '%d unnoticed\n' "$survivors"
  exit 1
fi

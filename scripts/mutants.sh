#!/usr/bin/env bash
# Shows that the tests can fail: takes one rule after the other out of a copy of the service, and runs the test that
# must notice. Only a failed test is noticing: not a copy that does not compile, and not a test that runs out of time.
# Exits 1 when a rule can be taken out unnoticed.
# Usage: ./scripts/mutants.sh [NAME...]
# shellcheck disable=SC2016 # the dollars are for perl
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

need_servers pgbouncer perl
TEST_DIR=$(mktemp -d)
at_exit "rm -rf '$TEST_DIR'"

wanted=" $* " survivors=0
printf '%-22s %-34s %-9s %s\n' 'rule taken out' 'test' 'noticed' 'seconds'

# mutant NAME TEST PERL: PERL must change one of the service's files.
mutant() {
  local began=$SECONDS noticed=yes tree=$TEST_DIR/$1 output=$TEST_DIR/$1.log
  if [[ $wanted != '  ' && $wanted != *" $1 "* ]]; then return; fi
  mkdir "$tree"
  cp -R ./*.go go.mod go.sum schema.sql "$tree"
  perl -0pi -e "$3" "$tree"/{main,products,cache,health}.go
  ! cmp -s <(cat ./*.go) <(cat "$tree"/*.go) || die "$1: its pattern does not match the service any more"
  (cd "$tree" && go test -count=1 -timeout 120s -v -run "^$2\$" .) >"$output" 2>&1 || true
  if ! grep -q '^--- FAIL' "$output" || grep -q 'panic: test timed out' "$output"; then
    tail -n 20 "$output"
    noticed=no survivors=$((survivors + 1))
  fi
  printf '%-22s %-34s %-9s %7d\n' "$1" "$2" "$noticed" "$((SECONDS - began))"
}

mutant no-lease-check TestFillAfterCommit 's/\n[^\n]*~= token then return end//'
mutant no-mark TestFillWhileWriting 's/\n[^\n]*redis\.call\(.ZADD.[^\n]*//'
mutant no-deletion-before TestFillWhileWriting 's/(redis\.call\(.ZADD.[^\n]*)\n[^\n]*redis\.call\(.DEL.[^\n]*/$1/'
mutant no-deletion-after TestFillWhileWriting 's/(redis\.call\(.ZREM.[^\n]*)\n[^\n]*redis\.call\(.DEL.[^\n]*/$1/'
mutant removes-all-marks TestOverlappingWriters 's/redis\.call\(.ZREM., (KEYS\[i \+ 1\]), ARGV\[1\]\)/redis.call("DEL", $1)/'
mutant mark-of-a-second TestWriterDies 's/int\(markLife\.Seconds\(\)\)/1/'
mutant unknown-is-refused TestFailedWrites 's/if !errors\.Is\(err, errOutcomeUnknown\)/if true/'
mutant sends-too-late TestLateWriter 's/time\.Now\(\)\.After\(sendDeadline\)/sendDeadline.IsZero()/'
mutant singleflight TestJoinOnlyLaterLookups 's/idle \|\| l\.started/idle/'
mutant answers-after-fill TestAnsweredBeforeFill 's/(\tl\.finish\(body, from, err\))[^\n]*\n(\tif token != ""(?s:.*?)\n\t\}\n)/$2$1\n/; s/token, l\.body/token, body/'
mutant next-before-fill TestAnsweredBeforeFill 's/(\tif token != ""(?s:.*?)\n\t\}\n)\tc\.startNext\(key, l\)/\tc.startNext(key, l)\n$1/'
mutant lookup-without-end TestPostgresSilent 's/context\.AfterFunc\(ctx, func/context.AfterFunc(context.Background(), func/'
mutant no-run-id-check TestOldSnapshot 's/\n[^\n]*c\.trust\.distrust\(errors\.New\("another redis[^\n]*//'
mutant no-drop TestOldSnapshot 's/c\.redis\.onAllKeys\("UNLINK", time\.Hour\); err/c.redis.onAllKeys("EXISTS", time.Hour); err/'
mutant no-settling TestNewRedisSettles 's/wait = settleTime/wait = 0/'
mutant no-uptime TestNewRedisSettles 's/max\(0, seconds-1\)/max(10, seconds-1)/'
mutant no-loss-of-trust TestUnreachableRedisUnderWriter 's/(if err != nil \{\s*)c\.trust\.distrust\(err\)/$1_ = err/'
mutant no-listener TestOtherSessions 's/(range queue \{)/$1\nif n != nil && n.Channel != v.ownChannel { continue }/'
mutant flood-key-by-key TestOtherSessions 's/ \|\| len\(queue\) > 0 && !v\.trust\.trusted\(\)//'
mutant deaf-but-trusting TestOtherSessions 's/\n[^\n]*c\.trust\.distrust\(fmt\.Errorf\("the listener lost[^\n]*/_ = err/; s/(ctx\.Err\(\) == nil:\s*)v\.trust\.distrust\(err\)/$1_ = err/'
mutant no-notify-when-cut TestWriteWithoutRedis 's/if !announced \{/if !announced \&\& false {/'
mutant first-write-unmarked TestWriteWithoutTrust 's/\n[^\n]*c\.reachable\.Store\(true\)[^\n]*//'
mutant no-identity TestBehindTheTrigger 's/if before != ""/if false \&\& before != ""/'
mutant no-timeout-check TestPgBouncer 's/if timeout != statementTimeout/if false \&\& timeout != statementTimeout/'
mutant no-probe TestPgBouncer 's/return v\.hear\(notification\)/return nil/'
mutant prepared-in-pooler TestPgBouncer 's/c\.mayPrepare\.Load\(\)/true/g'
mutant schema-tried-once TestSchema 's/v\.schemaApplied = v\.applyError == nil/v.schemaApplied = true/'
mutant no-liveness TestOpenConnections 's/if !c\.socket\.idle\(\)/if false/'
mutant no-repeat TestOpenConnections 's/!errors\.Is\(err, errRepeat\)/true/'
mutant no-taken-ids TestTakenIDs 's/; e == nil \|\|/; true || e == nil ||/'
mutant no-answer-limit TestPages 's/append\(args, maxAnswer\)/append(args, 1<<40)/; s/ \|\| before > 0 && products\.Len\(\) > maxAnswer//'
mutant time-goes-back TestNotNow 's/clock_timestamp\(\)/now()/'

((survivors == 0)) || die "$survivors unnoticed"

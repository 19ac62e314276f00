#!/usr/bin/env bash
# Checks everything: format, vet, the shell scripts, the tests against a PostgreSQL and a Redis of their own, and
# the whole stack end to end in a fresh copy, with the commands of README.md: without Docker and, where there is
# an engine with the images, with it. It installs what is missing where it may, stops what it started, and leaves
# no file behind. It does not touch a stack that you have running, and several may run at the same time.
#
#   ./scripts/check.sh
#   RUN=TestFillWhileWriting ./scripts/check.sh     # one test alone
set -euo pipefail

# Names of its own; what your own stack was told is not for this one. One version, so that an image of the same code is
# built once.
export COMPOSE_PROJECT_NAME=desafio3-check-$$ DESAFIO3_VERSION=check
unset LOG_LEVEL DESAFIO3_MODE DESAFIO3_STATE
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
shopt -s nullglob

# ---------------------------------------------------------------- steps

names=() broken='' shown=0

# step NAME COMMAND...: starts it as a job of its own. Its name, its number among the jobs and its log belong together.
step() {
  local log=$TEST_DIR/log.${#names[@]}
  names+=("$1")
  start_job timed "${@:2}" </dev/null >"$log" 2>&1
}
timed() { TIMEFORMAT='%0R s' && time "$@"; } # which writes it into the log's last line

# results: waits for the steps that were started, and shows what one has printed when it failed.
results() {
  local i log
  for ((i = shown; i < ${#names[@]}; i++)); do
    log=$TEST_DIR/log.$i
    printf '%-44s' "${names[i]}"
    if wait "${jobs[i]}"; then
      printf '%sok%s %6s\n' "$green" "$plain" "$(tail -n 1 "$log")"
      sed -n '/^ok /p; /SEED=/p; /^ *phase .*slowest/,/^ *total /p; /left out/p' "$log"
    else
      printf '%sFAILED%s\n' "$red" "$plain"
      sed '/^=== /d; /^ *--- PASS/d; s/^/    | /' "$log"
      broken+="${names[i]}; "
    fi
  done
  shown=${#names[@]}
}

# ---------------------------------------------------------------- what the steps do

formatted() { is "$(gofmt -d . | tee /dev/stderr)" ''; }

# split FILE: writes each block of FILE that is marked sh or bash into a file of its own, named by its line.
split() {
  mkdir -p "$TEST_DIR/blocks/$1"
  awk -v folder="$TEST_DIR/blocks/$1" '
    /^ *```/ { file = "" } # where any block begins or ends
    file { print >file }
    /^ *```(sh|bash)$/ {
      sub(/^ *```/, "# a block marked ")
      file = sprintf("%s/%05d.%s", folder, NR, $NF)
      print >file
    }' "$1"
}

# blocks_are_sound: every block is Bash, and those of LEIAME.md are those of README.md, in the same order. Only the
# comments in them are in another language.
blocks_are_sound() {
  local block
  for block in "$TEST_DIR/blocks/README.md"/*; do bash -n "$block"; done
  split LEIAME.md
  diff -u --label README.md --label LEIAME.md <(commands README.md) <(commands LEIAME.md) ||
    die 'the blocks of README.md and LEIAME.md differ'
}
commands() { sed 's/  *# .*//' "$TEST_DIR/blocks/$1"/*; }

# follow_readme MODE: runs the blocks that are marked sh, in order, each in a shell of its own, on ports and with
# names of this check. Without Docker those that say "docker" are left out.
follow_readme() {
  local block line ran=0 blocks=("$TEST_DIR/blocks/README.md"/*.sh)
  for block in "${blocks[@]}"; do
    if is "$1" local && grep -qw docker "$block"; then continue; fi
    line=$((10#$(basename "$block" .sh)))
    title "README.md:$line"
    bash -xeuo pipefail -c "$(sed -E "s/(localhost|127\.0\.0\.1):8000/127.0.0.1:$WEB_PORT/g; s/desafio3([-_])/$project\1/g" "$block")" ||
      die "README.md:$line: the block that begins here failed"
    ran=$((ran + 1))
  done
  say "README.md: $ran blocks ran, $((${#blocks[@]} - ran)) that need Docker were left out"
}

# end_to_end MODE: what a user does with the stack, in a fresh copy. README.md starts it and runs the demonstrations.
end_to_end() {
  mkdir "$TEST_DIR/$1"
  # What a clone would have there, and what is not committed yet: all but what git leaves out, too.
  tar --exclude=./.git --exclude=./.local --exclude=./.env --exclude=./web -cf - . | tar -xf - -C "$TEST_DIR/$1"
  cd "$TEST_DIR/$1"
  state=$PWD/.local
  export DESAFIO3_MODE=$1 WEB_PORT POSTGRES_PORT REDIS_PORT
  WEB_PORT=$(free_port) POSTGRES_PORT=$(free_port) REDIS_PORT=$(free_port)
  end_on_signals
  at_exit './scripts/clean.sh >/dev/null 2>&1'
  follow_readme "$1"

  title 'Starting it again is harmless, and populating it again does not double the catalogue'
  ./scripts/start.sh
  ./scripts/populate.sh
  holds_8_products
  ./scripts/monitor.sh 3
  title 'The data outlives the stack'
  ./scripts/stop.sh
  ./scripts/start.sh
  holds_8_products
  title 'Cleaning leaves nothing'
  ./scripts/clean.sh
  claim 'no process listens on its port' not port_taken "$WEB_PORT"
  claim 'no folder with data' test ! -e "$state"
  verdict
}

holds_8_products() { (attach && request GET /products && claim 'the catalogue holds 8 products' is "$(field count)" 8 && verdict); }

# run_tests ARGUMENT...: most tests wait most of the time, so more of them run at the same time than there are processors;
# but not so many that servers answer too late.
run_tests() { go test -v -count=1 -parallel 6 "$@"; }

# beside_swarm COMMAND...: runs it while demo_swarm.sh, also that of another check, may not leave its swarm.
beside_swarm() { lock_engine --shared && "$@"; }
in_swarm() { is "$(swarm_state)" active; }

# ---------------------------------------------------------------- the run

have go || die 'Go is needed: https://go.dev/dl/'
need 'gcc clang=gcc libc6-dev' # for the race detector
need shellcheck 2>/dev/null || say 'shellcheck is not installed: the scripts are not checked'

private_servers -c fsync=off
if [[ -n ${RUN:-} ]]; then
  run_tests -run "$RUN" .
  exit
fi

split README.md
step 'gofmt' formatted
step 'go vet' go vet ./...
if have shellcheck; then step 'shellcheck' shellcheck -x scripts/*.sh .ci/run; fi
step 'the blocks of README.md and LEIAME.md' blocks_are_sound
step 'go test -race' run_tests -race -timeout 80m ./...
results # before the next steps: some tests measure times
step 'end to end, without Docker' end_to_end local
without_docker=$! reason=$(why_not_docker)
if [[ -n $reason ]]; then
  say "with Docker: left out, $reason"
else
  if have flock && ! in_swarm && [[ -z $(compose_containers) ]]; then
    step 'demo_swarm.sh' ./scripts/demo_swarm.sh
    until in_swarm || gone $!; do sleep 0.1; done # it refuses an engine where stacks of Compose run
  else
    say 'demo_swarm.sh: left out, since the engine is in a swarm, or stacks of Compose run there'
  fi
  step 'end to end, with Docker' beside_swarm end_to_end docker
  wait_for 600 gone "$without_docker" || true # all of it at the same time is too much for two slow processors
  step 'demo_orchestration.sh' beside_swarm ./scripts/demo_orchestration.sh
fi
results
[[ -z $broken ]] || die "${broken}did not hold"
[[ -n $reason || -z $(in_docker "$project") ]] || die "Docker still has $(in_docker "$project")"
printf '\n%sEverything holds.%s\n' "$green" "$plain"

#!/usr/bin/env bash
# Checks everything: format, vet, the shell scripts, the documents, the tests, and the whole stack end to end in a fresh
# copy, with the commands of the documents: without Docker and, if an engine has the images, with it. It installs what is
# missing if it may, stops what it started, and leaves no file behind. It does not touch a stack that you have running,
# and several may run at the same time. One test alone is: go test -run TestFillWhileWriting .
set -euo pipefail

# Names of its own; what your own stack was told is not for this one. One version, so that an image of the same code is
# built once.
export COMPOSE_PROJECT_NAME=desafio3-check-$$ DESAFIO3_VERSION=check
unset LOG_LEVEL DESAFIO3_MODE DESAFIO3_STATE
COMPOSE_DISABLE_ENV_FILE=1 # nor what your .env says
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
      sed -n '/^ok /p; /SEED=/p; /in total:/p; /left out/p' "$log"
      sed -nE 's/^ *--- PASS: (.*) \((.*)s\)$/\2 s  \1/p' "$log" | sort -rn | head # the ten slowest tests
    else
      printf '%sFAILED%s\n' "$red" "$plain"
      sed '/^=== /d; /^ *--- PASS/d; s/^/    | /' "$log"
      broken+="${names[i]}; "
    fi
  done
  shown=${#names[@]}
}

# ---------------------------------------------------------------- what the steps do

formatted() { is "$(gofmt -d . | tee /dev/stderr)" '' && go vet ./...; }

# The documents in the order in which their blocks run.
documents=(README.md docs/{compose,cache,reference,scale,exercises}*.md)

# split FILE: writes each block of FILE that is marked sh or bash into a file of its own, named by its line.
split() {
  mkdir -p "$TEST_DIR/blocks/$1"
  awk -v folder="$TEST_DIR/blocks/$1" '
    /^ *```/ { file = "" } # where any block begins or ends
    file { print >file }
    /^ *```(sh|bash)$/ {
      file = sprintf("%s/%05d.%s", folder, NR, substr($NF, 4))
      print "# a block marked " $NF >file
    }' "$1"
}

# documents_are_sound: links lead somewhere, every block is Bash, and the blocks of a document and its twin are the same in
# the same order: only the comments in them are in another language. README.md is short.
documents_are_sound() {
  local document twin block
  for document in "${documents[@]}"; do
    twin=$(sed 's|^docs/|docs/pt/|; s|^README|LEIAME|' <<<"$document")
    split "$document" && split "$twin"
    diff -u --label "$document" --label "$twin" <(commands "$document") <(commands "$twin") || die "the blocks of $document and $twin differ"
    for block in "$TEST_DIR/blocks/$document"/*; do bash -n "$block"; done
  done
  (($(wc -l <README.md) <= 220 && $(wc -c <README.md) <= 12000)) || die 'README.md has more than 220 lines or 12,000 bytes'
  links_lead_somewhere ./*.md docs/*.md docs/pt/*.md
}
commands() { sed 's/  *# .*//' "$TEST_DIR/blocks/$1"/*; }

# links_lead_somewhere FILE...: each relative link has its file, and its heading there. GitHub makes the anchor of a
# heading of its letters, digits, hyphens and underscores, and of blanks, which become hyphens. The second heading of the
# same words gets "-1".
links_lead_somewhere() {
  perl -CSDA -Mutf8 -MCwd=abs_path -MFile::Basename -ne '
    if (/^#+ +(.*?) *$/) {
      $heading = abs_path($ARGV) . "#" . lc $1 =~ s/\]\(.*?\)//gr =~ s/[^\w\- ]//gr =~ tr/ /-/r;
      $there{"$heading-" . ($there{$heading} - 1)} = 1 if $there{$heading}++;
    }
    $wanted{abs_path(dirname($ARGV) . "/" . ($1 || basename($ARGV))) . $2} = "$ARGV: nothing is at $1$2\n"
      while /\]\((?!\w+:)([^)# ]*)(#?[^) ]*)/g;
    END {
      # A line of code, as in main.go#L10, is no heading.
      for (keys %wanted) { $? = print $wanted{$_} unless $there{$_} || !/#[^L]/ && -e s/#.*//r }
    }' "$@"
}

# follow_documents MODE: runs the blocks that are marked sh, in order, each in a shell of its own, on ports and with
# names of this check. Without Docker those that say "docker" are left out.
follow_documents() {
  local block where ran=0 blocks=()
  for where in "${documents[@]}"; do blocks+=("$TEST_DIR/blocks/$where"/*.sh); done
  for block in "${blocks[@]}"; do
    if is "$1" local && grep -qw docker "$block"; then continue; fi
    where=${block#"$TEST_DIR/blocks/"}
    title "$where"
    bash -xeuo pipefail -c "$(sed -E "s/(localhost|127\.0\.0\.1):8000/127.0.0.1:$WEB_PORT/g; s/desafio3([-_])/$project\1/g" "$block")" ||
      die "$where: this block failed. Its name is the line at which it begins"
    ran=$((ran + 1))
  done
  say "$ran blocks ran, $((${#blocks[@]} - ran)) that need Docker were left out"
}

# end_to_end MODE: what a user does with the stack, in a fresh copy. The documents start it and run the demonstrations.
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
  follow_documents "$1"

  # Starting it again is harmless, and populating it again does not double the catalogue.
  ./scripts/start.sh
  ./scripts/populate.sh
  holds_8_products
  ./scripts/monitor.sh 3
  # The data outlives the stack.
  ./scripts/stop.sh
  ./scripts/start.sh
  holds_8_products
  # Cleaning leaves nothing.
  ./scripts/clean.sh
  claim 'no process listens on its port' not port_taken "$WEB_PORT"
  claim 'no folder with data' test ! -e "$state"
  verdict
}

holds_8_products() { (attach && request GET /products && claim 'the catalogue holds 8 products' is "$(field count)" 8 && verdict); }

# beside_swarm COMMAND...: runs it while demo_swarm.sh, also that of another check, may not leave its swarm.
beside_swarm() { lock_engine --shared && "$@"; }
in_swarm() { is "$(swarm_state)" active; }

# ---------------------------------------------------------------- the run

have go || die 'Go is needed: https://go.dev/dl/'
need 'gcc clang=gcc libc6-dev' # for the race detector
need_servers
PATH+=:/usr/sbin need pgbouncer perl
need shellcheck 2>/dev/null || say 'shellcheck is not installed: the scripts are not checked'

TEST_DIR=$(mktemp -d)
at_exit "end_jobs && rm -rf '$TEST_DIR'"
step 'gofmt, go vet' formatted
if have shellcheck; then step 'shellcheck' shellcheck -x scripts/*.sh .ci/run; fi
step 'the documents' documents_are_sound
step 'go test -race' go test -v -race -count=1 -timeout 80m ./...
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

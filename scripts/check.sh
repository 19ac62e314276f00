#!/usr/bin/env bash
# Checks everything: format, vet, the shell scripts, the documents, the tests, and the whole stack end to end in a fresh
# copy, with the commands of the documents: without Docker and, if an engine has the images, with it. It installs what
# is missing if it may, stops what it started, and leaves no file behind. It does not touch a running stack of yours, and
# several checks may run at the same time. To run one test only: go test -run TestFillWhileWriting .
set -euo pipefail

# Names of its own, and none of your stack's settings. One version for all, so that the image is built only once.
export COMPOSE_PROJECT_NAME=desafio3-check-$$ DESAFIO3_VERSION=check
unset LOG_LEVEL DESAFIO3_MODE DESAFIO3_STATE
COMPOSE_DISABLE_ENV_FILE=1 # nor those of your .env
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
shopt -s nullglob

# step NAME COMMAND...: runs it, and shows what it printed only if it failed. One step at a time: some tests and
# demonstrations measure times.
broken=''
step() {
  local result log=$TEST_DIR/log started=$SECONDS
  printf '%-44s' "$1"
  set +e # "if" would also switch it off inside the step
  (set -e && "${@:2}") </dev/null >"$log" 2>&1
  result=$?
  set -e
  if ((result == 0)); then
    printf '%sok%s %4d s\n' "$green" "$plain" $((SECONDS - started))
    sed -n '/^ok /p; /SEED=/p; /in total:/p; /left out/p' "$log"
    sed -nE 's/^ *--- PASS: (.*) \((.*)s\)$/\2 s  \1/p' "$log" | sort -rn | head # the ten slowest tests
  else
    printf '%sFAILED%s\n' "$red" "$plain"
    sed '/^=== /d; /^ *--- PASS/d; s/^/    | /' "$log"
    broken+="$1; "
  fi
}

# ---------------------------------------------------------------- what the steps do

formatted() { is "$(gofmt -d . | tee /dev/stderr)" '' && go vet ./...; }

# The documents in the order in which their blocks run.
documents=(README.md docs/{compose,cache,reference,scale,exercises}.md)

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

# documents_are_sound: every link has a target, every block is Bash, and a document and its translation have the same
# blocks in the same order, except for comments. README.md is short.
documents_are_sound() {
  local document twin block
  for document in "${documents[@]}"; do
    twin=$(sed 's|^docs/|docs/pt/|; s|^README|LEIAME|' <<<"$document")
    split "$document" && split "$twin"
    diff -u <(commands "$document") <(commands "$twin") || die "the blocks of $document and $twin differ"
    for block in "$TEST_DIR/blocks/$document"/*; do bash -n "$block"; done
  done
  (($(wc -l <README.md) <= 220 && $(wc -c <README.md) <= 12000)) || die 'README.md is over 220 lines or 12,000 bytes'
  links_have_targets ./*.md docs/*.md docs/pt/*.md
}
commands() { sed 's/  *# .*//' "$TEST_DIR/blocks/$1"/*; }

# links_have_targets FILE...: the file of each relative link exists, and has the heading. GitHub makes the anchor of a
# heading from its letters, digits, hyphens and underscores, and from its spaces, which become hyphens. The second
# heading with the same words gets "-1".
links_have_targets() {
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

# follow_documents MODE: runs the blocks that are marked sh, in order, each in a shell of its own, with the ports and
# names of this check. Without Docker it leaves out those that say "docker".
follow_documents() {
  local block where ran=0 blocks=() adapted=$TEST_DIR/block
  for where in "${documents[@]}"; do blocks+=("$TEST_DIR/blocks/$where"/*.sh); done
  for block in "${blocks[@]}"; do
    if is "$1" local && grep -qw docker "$block"; then continue; fi
    where=${block#"$TEST_DIR/blocks/"}
    title "$where"
    sed -E "s/(localhost|127\.0\.0\.1):8000/127.0.0.1:$WEB_PORT/g; s/desafio3([-_])/$project\1/g" "$block" >"$adapted"
    bash -xeuo pipefail "$adapted" || die "$where: this block, which begins at this line, failed"
    ran=$((ran + 1))
  done
  say "$ran blocks ran, $((${#blocks[@]} - ran)) that need Docker were left out"
}

# end_to_end MODE: what a user does with the stack, in a fresh copy. The documents start it and run the demonstrations.
end_to_end() {
  mkdir "$TEST_DIR/$1"
  # What a clone would have, and what is not committed yet: everything except what git ignores.
  tar --exclude=./.git --exclude=./.local --exclude=./.env --exclude=./web -cf - . | tar -xf - -C "$TEST_DIR/$1"
  cd "$TEST_DIR/$1"
  state=$PWD/.local
  export DESAFIO3_MODE=$1 WEB_PORT POSTGRES_PORT REDIS_PORT
  WEB_PORT=$(free_port) POSTGRES_PORT=$(free_port) REDIS_PORT=$(free_port)
  end_on_signals
  at_exit './scripts/clean.sh >/dev/null 2>&1'
  follow_documents "$1"

  ./scripts/start.sh
  ./scripts/populate.sh
  holds_8_products 'starting and populating again adds no product'
  ./scripts/monitor.sh 3
  ./scripts/stop.sh
  ./scripts/start.sh
  holds_8_products 'stopping and starting keeps the data'
  ./scripts/clean.sh
  claim 'no process listens on its port' not port_taken "$WEB_PORT"
  claim 'clean.sh leaves no folder with data' test ! -e "$state"
  verdict
}
holds_8_products() { (attach && expect "$1" '200 * {"count":8,' GET /products && verdict); }

# beside_swarm COMMAND...: runs it while demo_swarm.sh, which another check may run, may not leave its swarm.
beside_swarm() { lock_engine --shared && "$@"; }

# ---------------------------------------------------------------- the run

# Cgo needs a C compiler for the race detector. README.md uses python3.
need_servers pgbouncer 'gcc clang=gcc libc6-dev' perl python3
need shellcheck 2>/dev/null || say 'shellcheck is not installed: the scripts are not checked'

TEST_DIR=$(mktemp -d)
at_exit "rm -rf '$TEST_DIR'"
step 'gofmt, go vet' formatted
! have shellcheck || step 'shellcheck' shellcheck -x scripts/*.sh .ci/run
step 'the documents' documents_are_sound
step 'go test -race' go test -v -race -count=1 -timeout 80m ./...
step 'end to end, without Docker' end_to_end local
reason=$(why_not_docker)
if [[ -n $reason ]]; then
  say "with Docker: left out, $reason"
else
  if is "$(swarm_state) $(compose_containers)" 'inactive '; then
    step 'demo_swarm.sh' ./scripts/demo_swarm.sh
  else
    say 'demo_swarm.sh: left out, since the engine is in a swarm, or stacks of Compose run there'
  fi
  step 'end to end, with Docker' beside_swarm end_to_end docker
  step 'demo_orchestration.sh' beside_swarm ./scripts/demo_orchestration.sh
fi
[[ -z $broken ]] || die "${broken}did not hold"
[[ -n $reason || -z $(in_docker "$project") ]] || die "Docker still has $(in_docker "$project")"
printf '\n%sEverything holds.%s\n' "$green" "$plain"

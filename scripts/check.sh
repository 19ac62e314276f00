#!/usr/bin/env bash
# Checks everything: format, vet, the shell scripts, the documents, the tests, and the whole stack end to end in a fresh
# copy, with the commands of the documents: without Docker, and with it if an engine has the images. It installs what is
# missing if it may, stops what it started, and leaves no file behind. It does not touch a running stack of yours, and
# several checks may run at the same time. To run one test only: go test -run TestFillWhileWriting .
set -euo pipefail

# Names of its own, and none of your stack's settings, nor those of your .env. One version for all, so that the image is
# built only once.
export COMPOSE_PROJECT_NAME=desafio3-check-$$ DESAFIO3_VERSION=check COMPOSE_DISABLE_ENV_FILE=1
unset LOG_LEVEL DESAFIO3_MODE DESAFIO3_STATE
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

names=() pids=() broken=''

# step NAME COMMAND...: starts it, in a process group of its own, so that it can be ended with all that it has started.
step() {
  set -m
  (TIMEFORMAT='%0R s' && time "${@:2}") </dev/null >"$TEST_DIR/$1.log" 2>&1 &
  set +m
  names+=("$1") pids+=($!)
}

# results: waits for the steps that were started, and shows what a step printed if it failed.
results() {
  local i log
  for i in "${!pids[@]}"; do
    log=$TEST_DIR/${names[i]}.log
    printf '%-44s' "${names[i]}"
    if wait "${pids[i]}"; then
      printf '%sok%s %6s\n' "$green" "$plain" "$(tail -n 1 "$log")"
      sed -n '/^ok /p; /in total:/p; /left out/p' "$log"
      sed -nE 's/^ *--- PASS: (.*) \((.*)s\)$/\2 s  \1/p' "$log" | sort -rn | head # the ten slowest tests
    else
      printf '%sFAILED%s\n' "$red" "$plain"
      sed '/^=== /d; /^ *--- PASS/d; s/^/    | /' "$log"
      broken+="${names[i]}; "
    fi
  done
  names=() pids=()
}

# ---------------------------------------------------------------- what the steps do

formatted() { is "$(gofmt -d . | tee /dev/stderr)" '' && go vet ./...; }

# The documents in the order in which their blocks run.
documents=(README.md docs/{compose,cache,reference,scale,exercises}.md)

# blocks LANGUAGE FILE [PATTERN]: prints the blocks of FILE that are marked with this language, except those that match
# the pattern.
blocks() {
  awk -v marker="^ *\`\`\`$1\$" -v without="${3:-^\$}" '
    /^ *```/ { if (text !~ without) printf "%s", text; text = ""; inside = $0 ~ marker; next }
    inside { text = text $0 "\n" }' "$2"
}

# documents_are_sound: every link has a target, every block is Bash, and a document and its translation have the same
# commands in the same order. README.md is short.
documents_are_sound() {
  local document twin
  for document in "${documents[@]}"; do
    twin=$(sed 's|^docs/|docs/pt/|; s|^README|LEIAME|' <<<"$document")
    diff -u <(commands "$document") <(commands "$twin") || die "the commands of $document and $twin differ"
    blocks '(sh|bash)' "$document" | bash -n
  done
  (($(wc -l <README.md) <= 220 && $(wc -c <README.md) <= 12000)) || die 'README.md is over 220 lines or 12,000 bytes'
  links_have_targets ./*.md docs/*.md docs/pt/*.md
}
# commands FILE: its blocks without their comments, which are translated.
commands() { blocks '(sh|bash)' "$1" | sed 's/\(^\|  *\)# .*//'; }

# links_have_targets FILE...: the file of each relative link exists, and has the heading. GitHub makes the anchor of a
# heading from its letters, digits, hyphens and underscores, and from its spaces, which become hyphens.
links_have_targets() {
  perl -CSDA -Mutf8 -MCwd=abs_path -MFile::Basename -ne '
    $there{abs_path($ARGV) . "#" . lc $1 =~ s/\]\(.*?\)//gr =~ s/[^\w\- ]//gr =~ tr/ /-/r} = 1 if /^#+ +(.*?) *$/;
    $wanted{abs_path(dirname($ARGV) . "/" . ($1 || basename($ARGV))) . $2} = "$ARGV: nothing is at $1$2\n"
      while /\]\((?!\w+:)([^)# ]*)(#?[^) ]*)/g;
    END {
      # A line of code, as in main.go#L10, is no heading.
      for (keys %wanted) { $? = print $wanted{$_} unless $there{$_} || !/#[^L]/ && -e s/#.*//r }
    }' "$@"
}

# follow_documents MODE: runs the blocks that are marked sh, with the ports and names of this check. Each document gets
# its own shell. Without Docker it leaves out the blocks that need it.
follow_documents() {
  local document adapt="s/(localhost|127\.0\.0\.1):8000/127.0.0.1:$WEB_PORT/g; s/desafio3([-_])/$project\1/g"
  local omit='^$'
  if is "$1" local; then omit=docker; fi
  for document in "${documents[@]}"; do
    title "$document"
    bash -xeuo pipefail -c "$(blocks sh "$document" "$omit" | sed -E "$adapt")" || die "a command of $document failed"
  done
}

# end_to_end MODE: what a user does with the stack, in a fresh copy. The documents start it and run the demonstrations.
end_to_end() {
  mkdir "$TEST_DIR/$1"
  # What a clone would have, and what is not committed yet: everything except what git ignores.
  tar --exclude=./.git --exclude=./.local --exclude=./.env --exclude=./web -cf - . | tar -xf - -C "$TEST_DIR/$1"
  cd "$TEST_DIR/$1"
  export DESAFIO3_MODE=$1 WEB_PORT POSTGRES_PORT REDIS_PORT
  WEB_PORT=$(free_port) POSTGRES_PORT=$(free_port) REDIS_PORT=$(free_port)
  end_on_signals
  at_exit './scripts/clean.sh >/dev/null 2>&1'
  follow_documents "$1"

  ./scripts/start.sh
  claim 'starting and populating again adds no product' has "$(./scripts/populate.sh)" '8 products, nothing to add'
  ./scripts/monitor.sh 3
  ./scripts/stop.sh
  ./scripts/start.sh
  claim 'stopping and starting keeps the data' has "$(./scripts/populate.sh)" '8 products, nothing to add'
  ./scripts/clean.sh
  claim 'no process listens on its port' not port_taken "$WEB_PORT"
  claim 'clean.sh leaves no folder with data' test ! -e .local
  verdict
}

# ---------------------------------------------------------------- the run

# Cgo needs a C compiler for the race detector. README.md uses python3.
need_servers pgbouncer 'gcc clang=gcc libc6-dev' shellcheck perl python3

TEST_DIR=$(mktemp -d)
# Steps that still run have time to clean up.
# shellcheck disable=SC2016 # expanded at the exit
at_exit '((${#pids[@]} == 0)) || { kill -TERM -- "${pids[@]/#/-}" 2>/dev/null; wait; }; rm -rf "$TEST_DIR"'
step 'gofmt, go vet' formatted
step 'shellcheck' shellcheck -x scripts/*.sh .ci/run
step 'the documents' documents_are_sound
step 'go test -race' go test -v -race -count=1 -timeout 80m ./...
reason=$(why_not_docker)
if [[ -n $reason ]]; then
  say "with Docker: left out, $reason"
else
  # One check at a time: an engine that leaves a swarm forgets the names of the running containers
  # (https://github.com/moby/moby/issues/45144).
  ! have flock || { exec 9<"$(command -v docker)" && flock 9; }
  if is "$(swarm_state) $(compose_containers)" 'inactive '; then
    step 'demo_swarm.sh' env DRAIN_SECONDS=3 ./scripts/demo_swarm.sh # less than usual: to save time
  else
    say 'demo_swarm.sh: left out, since the engine is in a swarm, or stacks of Compose run there'
  fi
fi
results # before the next steps: demo_swarm.sh refuses an engine where stacks of Compose run
step 'end to end, without Docker' end_to_end local
[[ -n $reason ]] || step 'end to end, with Docker' end_to_end docker
[[ -n $reason ]] || step 'demo_orchestration.sh' ./scripts/demo_orchestration.sh
results
[[ -z $broken ]] || die "failed: ${broken%; }"
[[ -n $reason || -z $(in_docker "$project") ]] || die "Docker still has $(in_docker "$project")"
printf '\n%sEverything holds.%s\n' "$green" "$plain"

#!/usr/bin/env bash
# Removes the stack with its data, whichever way it was started: containers, volumes, networks and image,
# and the data of the stack without Docker. It says what it removes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

has_folder() { ! is "${DESAFIO3_MODE:-}" docker && [[ -e $state ]]; }
has_engine() { ! is "${DESAFIO3_MODE:-}" local && ! remote_engine >/dev/null && docker compose ls >/dev/null 2>&1; }
images() { docker images -q -f "$project_label" | sort -u; }

find_mode # refuses an engine on another machine, unless the stack without Docker runs
# Whose it is comes first: where one is refused, the other one stays, too.
if has_folder; then own_folder; fi
if has_engine; then own_stack; fi
has_folder || has_engine || say 'There is nothing to remove.'

if has_folder; then
  title "Removal of the folder $state"
  stop_local
  if [[ -L $state/postgres ]]; then rm -rf "$(readlink "$state/postgres")"; fi # where start_postgres had to put the data
  rm -rf "$state"
fi
if has_engine; then
  title "Removal of the stack $project from Docker"
  # Asked by the project's name, Compose removes all that has its label, and not only what docker-compose.yml names today:
  # somebody may have edited it. It keeps the images: those that newer builds have replaced have the label, but no name.
  docker compose -p "$project" down --volumes --remove-orphans --timeout 0
  # shellcheck disable=SC2046 # a list
  [[ -z $(images) ]] || docker image rm $(images)
fi

#!/usr/bin/env bash
# Removes the stack with its data, with Docker and without: containers, volumes, networks and images, and the folder of
# the stack without Docker. It prints what it removes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

has_folder() { ! is "${DESAFIO3_MODE:-}" docker && [[ -e $state ]]; }
has_engine() { ! is "${DESAFIO3_MODE:-}" local && ! remote_engine >/dev/null && docker compose ls >/dev/null 2>&1; }

find_mode # refuses an engine on another machine, unless the stack without Docker runs
# Both owners are checked before anything is removed.
if has_folder; then own_folder; fi
if has_engine; then own_stack; fi
has_folder || has_engine || say 'There is nothing to remove.'

if has_folder; then
  title "Removal of the folder $state"
  stop_local
  [[ ! -L $state/postgres ]] || rm -rf "$(readlink "$state/postgres")" # where start_postgres had to put the data
  rm -rf "$state"
fi
if has_engine; then
  title "Removal of the stack $project from Docker"
  # Given only the project's name, Compose removes everything with its label, even if docker-compose.yml was edited
  # meanwhile. It keeps images without a name, which newer builds have replaced, so these are removed by label, too.
  docker compose -p "$project" down --volumes --remove-orphans --timeout 0
  docker images -q -f "$project_label" | sort -u | while read -r image; do docker image rm "$image"; done
fi

#!/usr/bin/env bash
# Removes the stack with its data, whichever way it was started: containers, volumes, network and image,
# and the data of the stack without Docker. It says what it removed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh

# all_of_it: what Docker has of this project, a name in a line. An image that a newer build has replaced has
# lost its name, and Compose's label still tells whose it is.
all_of_it() {
  local image='image {{.Repository}} {{.ID}}'
  docker ps -a -f "$project_label" --format 'container {{.Names}}'
  docker volume ls -f "$project_label" --format 'volume {{.Name}}'
  docker network ls -f "$project_label" --format 'network {{.Name}}'
  { docker images --format "$image" "$project-web"; docker images --format "$image" -f "$project_label"; } | sort -u
}

removed=''
if ! is "${DESAFIO3_MODE:-}" local && have docker && docker compose version >/dev/null 2>&1; then
  removed=$(all_of_it 2>/dev/null || true)
fi
# Everything that is somebody else's is refused before anything is removed.
if [[ -n $removed ]]; then own_stack; fi
if ! is "${DESAFIO3_MODE:-}" docker && [[ -e $state ]]; then
  stop_local
  erase "$state"
  folder=$state
fi
if [[ -n $removed ]]; then
  docker compose down --volumes --remove-orphans
  while read -r kind _ id; do
    if is "$kind" image; then docker rmi "$id" >/dev/null; fi
  done <<<"$removed"
  left=$(all_of_it)
  [[ -z $left ]] || die "could not remove: $left"
fi

removed+=${folder:+${removed:+$'\n'}folder $folder}
if [[ -z $removed ]]; then
  say 'There is nothing to remove.'
else
  title 'Removed'
  while read -r line; do say "$line"; done <<<"$removed"
fi

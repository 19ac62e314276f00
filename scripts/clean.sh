#!/usr/bin/env bash
# Removes the stack with its data, whichever way it was started: containers, volumes, network and image,
# and the data of the stack without Docker. It says what it removed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh

# ours: what Docker has of this project, a name in a line. An image that a newer build has replaced has
# lost its name, and Compose's label still tells whose it is.
ours() {
  local label="label=com.docker.compose.project=$project" image='image {{.Repository}} {{.ID}}'
  docker ps -a -f "$label" --format 'container {{.Names}}'
  docker volume ls -f "$label" --format 'volume {{.Name}}'
  docker network ls -f "$label" --format 'network {{.Name}}'
  { docker images --format "$image" "$project-web"; docker images --format "$image" -f "$label"; } | sort -u
}

removed=''
if ! is "${DESAFIO3_MODE:-}" local && have docker && docker compose version >/dev/null 2>&1; then
  removed=$(ours 2>/dev/null || true)
  if [[ -n $removed ]]; then
    docker compose down --volumes --remove-orphans
    while read -r kind _ id; do
      if is "$kind" image; then docker rmi "$id" >/dev/null; fi
    done <<<"$removed"
    left=$(ours)
    [[ -z $left ]] || die "could not remove: $left"
  fi
fi
if ! is "${DESAFIO3_MODE:-}" docker && [[ -e $state ]]; then
  stop_local
  erase "$state"
  removed+=${removed:+$'\n'}"folder $state"
fi

if [[ -z $removed ]]; then
  say 'There is nothing to remove.'
else
  title 'Removed'
  while read -r line; do say "$line"; done <<<"$removed"
fi

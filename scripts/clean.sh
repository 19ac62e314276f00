#!/usr/bin/env bash
# Removes the stack with its data, whichever way it was started: containers, volumes, networks and image,
# and the data of the stack without Docker. It says what it removes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh

all=''
if ! is "${DESAFIO3_MODE:-}" docker && [[ -e $state ]]; then
  own_folder
  all="folder $state"$'\n'
fi
if ! is "${DESAFIO3_MODE:-}" local && docker info >/dev/null 2>&1; then
  own_stack
  # What Docker has of this project, in the order in which it can be removed. Not only what docker-compose.yml names
  # today: somebody may have edited it. An image that a newer build has replaced has lost its name, and Compose's
  # label still tells whose it is.
  all+=$(
    docker ps -a -f "$project_label" --format 'container {{.Names}}'
    docker volume ls -f "$project_label" --format 'volume {{.Name}}'
    docker network ls -f "$project_label" --format 'network {{.Name}}'
    docker images --format 'image {{.ID}} {{.Repository}}' "$project-web"
    docker images --format 'image {{.ID}} {{.Repository}}' -f "$project_label"
  )
fi
if [[ -z $all ]]; then
  say 'There is nothing to remove.'
  exit
fi
title 'Removing'
awk '!seen[$0]++' <<<"$all" | while read -r kind name rest && [[ -n $kind ]]; do # an image with a name is there twice
  say "$kind $name $rest"
  case $kind in
  folder) stop_local && erase "$state" ;;
  container) docker rm --force --volumes "$name" ;;
  *) docker "$kind" rm "$name" ;;
  esac >/dev/null
done

#!/usr/bin/env bash
# Stops the stack and keeps its data: ./scripts/start.sh brings it back as it was.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

find_mode
case $mode in
docker)
  # Not "down", which would remove the containers: they record the folder that this stack belongs to.
  own_stack && docker compose stop && say 'Stopped. The data is in the volumes.'
  ;;
local) stop_local && say "Stopped. The data is in $state." ;;
*) say 'Nothing is running.' ;;
esac

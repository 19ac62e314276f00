#!/usr/bin/env bash
# Stops the stack and keeps its data: ./scripts/start.sh brings it back as it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh

case $(running_mode || true) in
docker)
  docker compose down
  say 'Stopped. The data is in the volumes.'
  ;;
local)
  stop_local
  say "Stopped. The data is in $state."
  ;;
*) say 'Nothing is running.' ;;
esac

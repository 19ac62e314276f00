# shellcheck shell=bash
# What the scripts share. A script changes to the project's folder, sources this file and finds here:
# words for the terminal, requests and claims for the demonstrations, PostgreSQL and Redis as plain
# processes, and one way to reach the stack whether it runs under Docker or straight on the machine.
# Sourcing it starts nothing.

# COMPOSE_PROJECT_NAME and DESAFIO3_STATE give a second stack names and a folder of its own.
project=${COMPOSE_PROJECT_NAME:-desafio3}
state=${DESAFIO3_STATE:-$PWD/.local} # data, logs and pids of the stack without Docker

# ---------------------------------------------------------------- words

bold='' green='' red='' plain=''
if [[ -t 1 ]]; then bold=$'\e[1m' green=$'\e[32m' red=$'\e[31m' plain=$'\e[0m'; fi

title() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
say() { printf '  %s\n' "$*"; }
die() { printf '%serror:%s %s\n' "$red" "$plain" "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

case ${DESAFIO3_MODE:-local} in
local | docker) ;;
*) die "DESAFIO3_MODE must be local or docker, not \"$DESAFIO3_MODE\"" ;;
esac

# wait_for SECONDS COMMAND...: tries the command until it succeeds, for so long at most.
wait_for() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < deadline)) || return 1
    sleep 0.1
  done
}

# ---------------------------------------------------------------- requests and claims

# request METHOD PATH [JSON]: sends it to the service and prints a line about the answer, and what an error
# says. It leaves them in $status, $body, $cache (the header Cache-Status) and $micros (the microseconds).
request() {
  local answer head
  status=000 body='' cache='' micros=0
  if answer=$(curl -sS -i -m 20 -X "$1" ${3:+-H 'Content-Type: application/json' --data-binary "$3"} \
    -w '\n%{time_starttransfer}' "$url$2" 2>&1); then
    answer=${answer//$'\r'/}
    head=${answer%%$'\n\n'*} body=${answer#*$'\n\n'}
    micros=${body##*$'\n'} micros=$((10#${micros/[.,]/}))
    body=${body%$'\n'*} body=${body%$'\n'}
    read -r _ status _ <<<"$head"
    if [[ $head =~ Cache-Status:\ ([^$'\n']*) ]]; then cache=${BASH_REMATCH[1]}; fi
  else
    body=${answer%$'\n'*}
  fi
  say "$(printf '%-6s %-34s %s  %-17s %6d.%d ms' "$1" "$2" "$status" "$cache" \
    "$((micros / 1000))" "$((micros % 1000 / 100))")"
  if [[ -n ${3:-} ]]; then say "       $3"; fi
  if ((10#$status >= 400)) && has "$body" '"detail"'; then say "       $(field detail)"; fi
}

# field NAME: the first value under that name in the last answer.
field() { if [[ $body =~ \"$1\":\ *\"?([^\",}]*) ]]; then echo "${BASH_REMATCH[1]}"; fi; }

is() { [[ $1 == "$2" ]]; }
has() { [[ $1 == *"$2"* ]]; }

# claim WHAT COMMAND...: checks what a demonstration says. After the last claim comes verdict.
passed=0 failed=0
claim() {
  local what=$1
  shift
  if "$@"; then
    passed=$((passed + 1))
    printf '  %sok%s    %s\n' "$green" "$plain" "$what"
  else
    failed=$((failed + 1))
    printf '  %sFAIL%s  %s\n' "$red" "$plain" "$what"
    printf '        checked: %s\n        the last answer: %s %.400s\n' "$*" "${status:-}" "${body:-}"
  fi
}

verdict() {
  printf '\n%d passed, %d failed\n' "$passed" "$failed"
  ((failed == 0))
}

# ---------------------------------------------------------------- what must be installed

# Debian keeps PostgreSQL's servers off the PATH, and Homebrew its versions.
find_postgres() {
  local folder
  have postgres && return
  for folder in /usr/lib/postgresql/*/bin /opt/homebrew/opt/postgresql*/bin /usr/local/opt/postgresql*/bin; do
    if [[ -x $folder/postgres ]]; then PATH=$folder:$PATH; fi # of several, the last: the newest
  done
  have postgres
}

redis_server() { command -v redis-server || command -v valkey-server; }

# need PROGRAM...: in the end all are there, or it says what to install and fails. It installs itself
# only where that needs no question: as root, on a system with apt.
need() {
  local program missing=''
  for program; do
    case $program in
    postgres) find_postgres || missing+=' postgresql' ;;
    redis) redis_server >/dev/null || missing+=' redis-server' ;;
    ps) have ps || missing+=' procps' ;;
    gcc) have gcc || have clang || missing+=' gcc libc6-dev' ;;
    *) have "$program" || missing+=" $program" ;;
    esac
  done
  [[ -n $missing ]] || return 0
  if ((EUID != 0)) || ! have apt-get; then
    printf 'Please install:%s (Debian or Ubuntu: sudo apt-get install%s; Homebrew: brew install postgresql redis)\n' \
      "$missing" "$missing" >&2
    return 1
  fi
  say "installing$missing"
  apt_install "$missing" || return 1
  if has "$missing" postgresql; then find_postgres; fi
}

# apt_install PACKAGES: installs them, but lets none of their servers loose: no cluster of PostgreSQL is
# made, and nothing is started, now or when the machine boots. What was there before is not touched.
apt_install() (
  exec 9</usr/bin/apt-get && flock 9 || exit 1 # one at a time: apt's own lock fails instead of waiting
  policy=/usr/sbin/policy-rc.d clusters=/etc/postgresql-common/createcluster.d/desafio3.conf ours=$clusters
  trap 'rm -f $ours' EXIT
  mkdir -p "${clusters%/*}"
  echo 'create_main_cluster = false' >"$clusters"
  if [[ ! -e $policy ]]; then
    ours+=" $policy"
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
  fi
  export DEBIAN_FRONTEND=noninteractive
  log=$(mktemp) ours+=" $log"
  # shellcheck disable=SC2086 # a list of names
  if ! { apt-get update -qq; apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 $1; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "apt-get could not install:$1" >&2
    exit 1
  fi
  if has "$1" redis-server && have systemctl; then systemctl disable redis-server >/dev/null 2>&1 || true; fi
)

# need_servers: PostgreSQL, a Redis that is new enough, and the little that these scripts use are there.
need_servers() {
  local version
  need curl ps postgres redis || return
  version=$("$(redis_server)" --version) # "Redis server v=7.0.15 sha=..."
  version=${version#*v=} version=${version%% *}
  if ((${version%%.*} < 7)); then
    echo "Redis 7.0 or newer is needed, or Valkey; $(redis_server) is $version" >&2
    return 1
  fi
  if ((EUID == 0)) && ! { id postgres && have runuser; } >/dev/null 2>&1; then
    echo "PostgreSQL does not run as root, and there is no user 'postgres' to run it as: use another account" >&2
    return 1
  fi
}

port_taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# free_port: a port that nobody listens on, from below the range that outgoing connections use.
free_port() {
  local port
  while port=$((20000 + RANDOM % 12000)) && port_taken "$port"; do :; done
  echo "$port"
}

# ---------------------------------------------------------------- PostgreSQL and Redis as plain processes

# PostgreSQL refuses to run as root. The change of folder is for a user that may not enter this one.
as_postgres() {
  if ((EUID == 0)); then (cd / && exec runuser -u postgres -- "$@"); else "$@"; fi
}

# start_postgres DIR PORT [ARGUMENT...]: starts a PostgreSQL on 127.0.0.1:PORT with its data and its log
# in DIR, makes the cluster and its database first where there is none, and returns when it answers.
# POSTGRES_USER, POSTGRES_PASSWORD and POSTGRES_DB count when the cluster is made. Words in
# POSTGRES_ARGS are further arguments, for those who start it again without knowing the first ones.
start_postgres() {
  local dir port=$2 home data quote="'" user=${POSTGRES_USER:-postgres} password=${POSTGRES_PASSWORD:-postgres123}
  mkdir -p "$1" && dir=$(cd "$1" && pwd) && find_postgres || return 1
  shift 2
  # shellcheck disable=SC2086 # words
  set -- -c "listen_addresses=127.0.0.1" -c "port=$port" -c "unix_socket_directories=" ${POSTGRES_ARGS:-} "$@"

  home=$dir/postgres
  if [[ ! -e $home ]]; then
    if ((EUID == 0)) && ! as_postgres test -x "$dir"; then
      # DIR lies below a folder that is closed to the user postgres: the data goes where it may go.
      ln -sfn "$(mktemp -d /var/lib/desafio3-postgres.XXXXXX)" "$home" || return 1
    else
      mkdir "$home" || return 1
    fi
    if ((EUID == 0)); then chown postgres "$home/" || return 1; fi
  fi
  home=$(cd -P "$home" && pwd) data=$home/data

  if [[ ! -e $data ]]; then
    # Made under another name, so that a cluster called "data" is always a whole one.
    rm -rf "$home/new"
    if ! { as_postgres initdb -D "$home/new" -U "$user" -E UTF8 --no-locale --auth=trust &&
      as_postgres postgres --single -D "$home/new" postgres <<<"ALTER USER \"$user\" PASSWORD '${password//$quote/$quote$quote}'
CREATE DATABASE \"${POSTGRES_DB:-products_db}\"" &&
      echo 'host all all 127.0.0.1/32 scram-sha-256' >"$home/new/pg_hba.conf" &&
      mv "$home/new" "$data"; } >>"$dir/postgres.log" 2>&1; then
      tail -n 20 "$dir/postgres.log" >&2
      return 1
    fi
  fi

  # A cluster that runs is left alone. Its pid alone proves nothing: after a crash of the machine the
  # number may be somebody else's.
  if as_postgres pg_ctl -D "$data" status >/dev/null 2>&1 && pg_isready -q -h 127.0.0.1 -p "$port"; then return; fi
  as_postgres pg_ctl -D "$data" -w -t 120 -o "$(printf '%q ' "$@")" start </dev/null >>"$dir/postgres.log" 2>&1 ||
    { tail -n 20 "$dir/postgres.log" >&2; return 1; }
}

# stop_postgres DIR [fast|immediate]: "immediate" is a crash, as PostgreSQL sees it.
stop_postgres() {
  [[ -e $1/postgres/data/postmaster.pid ]] || return 0
  local data
  find_postgres && data=$(cd -P "$1/postgres/data" && pwd) || return 1
  as_postgres pg_ctl -D "$data" -m "${2:-fast}" -w -t 180 stop >/dev/null 2>&1 ||
    ! as_postgres pg_ctl -D "$data" status >/dev/null 2>&1
}

# erase DIR: removes it, and the data that start_postgres may have put elsewhere. Stop the servers first.
erase() {
  if [[ -L $1/postgres ]]; then rm -rf "$(readlink "$1/postgres")"; fi
  rm -rf "$1"
}

# start_redis DIR PORT [ARGUMENT...]: the same for Redis, with the settings of docker-compose.yml.
start_redis() {
  local dir port=$2
  mkdir -p "$1/redis" && dir=$(cd "$1" && pwd) || return 1
  shift 2
  if alive "$dir/redis.pid" "-server 127.0.0.1:$port"; then return; fi
  "$(redis_server)" --bind 127.0.0.1 --port "$port" --dir "$dir/redis" --save '60 1' \
    --maxmemory 64mb --maxmemory-policy volatile-lru --requirepass "${REDIS_PASSWORD:-}" \
    --daemonize yes --pidfile "$dir/redis.pid" --logfile "$dir/redis.log" "$@" >/dev/null || return 1
  wait_for 60 redis_answers "$port" || { tail -n 20 "$dir/redis.log" >&2; return 1; }
}

stop_redis() { end_process "$1/redis.pid" '-server 127.0.0.1:' 30; }

local_redis() {
  local port=$1 server
  shift
  server=$(redis_server)
  ${REDIS_PASSWORD:+env "REDISCLI_AUTH=$REDIS_PASSWORD"} "${server%-server}-cli" -h 127.0.0.1 -p "$port" "$@"
}

# private_servers DIR: a PostgreSQL and a Redis of a test's own, in DIR and on free ports, which everything that
# is started afterwards finds in its environment.
private_servers() {
  export POSTGRES_HOST=127.0.0.1 POSTGRES_PORT POSTGRES_DB=products_db POSTGRES_USER=postgres \
    POSTGRES_PASSWORD=postgres123 REDIS_HOST=127.0.0.1 REDIS_PORT REDIS_PASSWORD=''
  POSTGRES_PORT=$(free_port)
  start_postgres "$1" "$POSTGRES_PORT"
  REDIS_PORT=$(free_port)
  start_redis "$1" "$REDIS_PORT"
}

# remove_servers DIR: stops them and erases DIR.
remove_servers() {
  stop_redis "$1" || true
  stop_postgres "$1" immediate || true
  erase "$1"
}

redis_answers() { is "$(local_redis "$1" ping 2>/dev/null)" PONG; }

# alive PIDFILE NAME: the process noted there runs, and is the one we mean: NAME is in its command line.
alive() { has "$(ps -p "$(cat "$1" 2>/dev/null)" -o command= 2>/dev/null)" "$2"; }

ended() { ! alive "$@"; }

# end_process PIDFILE NAME SECONDS: asks it to end, and after so many seconds makes it.
end_process() {
  local pid
  pid=$(cat "$1" 2>/dev/null) || return 0
  if alive "$1" "$2"; then
    kill -CONT "$pid" && kill -TERM "$pid"
    wait_for "$3" ended "$1" "$2" || kill -KILL "$pid"
    wait_for 10 ended "$1" "$2" || return 1
  fi
  rm -f "$1"
}

# ---------------------------------------------------------------- the stack, with Docker or without

# base_images: the images that Dockerfile and docker-compose.yml begin with.
base_images() {
  sed -nE 's/^(FROM| *image:) +([^ $]+:[^ ]+).*/\2/p' Dockerfile docker-compose.yml
}

# running_mode: prints "local" or "docker", whichever stack is there; DESAFIO3_MODE decides if it is set.
running_mode() {
  if [[ -n ${DESAFIO3_MODE:-} ]]; then
    echo "$DESAFIO3_MODE"
  elif [[ -e $state/env ]]; then # from start to stop
    echo local
  elif have docker && [[ -n $(docker ps -aq -f "label=com.docker.compose.project=$project" 2>/dev/null) ]]; then
    echo docker
  else
    return 1
  fi
}

# attach: finds the stack that runs, and sets $mode and $url for the functions below and for request.
attach() {
  local not_running='the stack is not running: start it with ./scripts/start.sh'
  have curl || die 'curl is needed'
  mode=$(running_mode) || die "$not_running"
  if is "$mode" local; then
    [[ -e $state/env ]] || die "$not_running"
    find_postgres || true # for psql
    # shellcheck source=/dev/null
    source "$state/env" # its ports and passwords
    alive "$state/web.pid" "$state/web" || die 'the service has ended: ./scripts/logs.sh web says why, ./scripts/start.sh starts it'
    url=$(local_url)
  else
    url=$(docker port "$project-web" 8000 2>/dev/null | head -n 1) || true
    [[ -n $url ]] || die "$not_running"
    url=http://${url/#0.0.0.0/127.0.0.1}
  fi
}

# local_url: where the service without Docker answers.
local_url() { echo "http://${BIND_ADDRESS/#0.0.0.0/127.0.0.1}:$WEB_PORT"; }

# delete_product: deletes the product $id that a script has made, if it has not done so itself.
delete_product() { if [[ -n $id ]]; then request DELETE "/products/$id" >/dev/null; fi; }

# stop_local: ends the stack without Docker and keeps its data.
stop_local() {
  if ! { end_process "$state/web.pid" "$state/web" 15 && stop_redis "$state" && stop_postgres "$state"; }; then
    die "something in $state did not stop"
  fi
  rm -f "$state/env"
}

# cache_in_use: the service is connected to Redis a moment before it has made sure that it can trust it.
cache_in_use() { request GET /stats >/dev/null && has "$body" '"trusted":true'; }

# sql QUERY: what psql prints for it, bare.
sql() {
  if is "$mode" local; then
    PGPASSWORD=$POSTGRES_PASSWORD psql -h 127.0.0.1 -p "$POSTGRES_PORT" -U "$POSTGRES_USER" -d "$POSTGRES_DB" -XqtAc "$1"
  else
    # shellcheck disable=SC2016 # the container's own variables
    docker exec "$project-postgres" sh -c 'psql -U "$POSTGRES_USER" -d "$POSTGRES_DB" -XqtAc "$1"' sh "$1"
  fi
}

# redis_cli COMMAND...: what redis-cli prints for it.
redis_cli() {
  if is "$mode" local; then local_redis "$REDIS_PORT" "$@"; else docker exec "$project-redis" redis-cli "$@"; fi
}

# control stop|start|pause|unpause postgres|redis: does it to one server (without Docker, only Redis can
# be paused), and shows the command that does it under Docker.
control() {
  if is "$mode" docker; then
    say "\$ docker $1 $project-$2"
    docker "$1" "$project-$2" >/dev/null
    return
  fi
  say "$1 $2"
  case "$1 $2" in
  'stop postgres') stop_postgres "$state" ;;
  'start postgres') start_postgres "$state" "$POSTGRES_PORT" ;;
  'stop redis') stop_redis "$state" ;;
  'start redis') start_redis "$state" "$REDIS_PORT" ;;
  'pause redis') kill -STOP "$(<"$state/redis.pid")" ;;
  'unpause redis') kill -CONT "$(<"$state/redis.pid")" ;;
  *) die "cannot $1 $2 here" ;;
  esac
}

# shellcheck shell=bash
# What the scripts share: words for the terminal, requests and claims for the demonstrations, PostgreSQL and Redis as
# plain processes, and one way to reach the stack with Docker or without. Sourcing it changes to the project's folder
# and starts nothing.

# ---------------------------------------------------------------- the environment and the file .env

# Nothing in the user's environment may change what our tools do: no option of Bash, no function that replaces a
# command, no setting of psql, redis-cli, ps, grep, git, go or Compose, no locale with decimal commas. Proxies stay,
# because docker, go and apt may need one to download. The function http below ignores them.
set +o posix +o noclobber +o noglob && shopt -u failglob nullglob nocasematch
# shellcheck disable=SC2046,SC2086 # lists of names
unset -f $(compgen -A function) &&
  unset CDPATH ENV BASH_ENV POSIXLY_CORRECT COLUMNS PAGER PSQL_PAGER PS_FORMAT PS_PERSONALITY \
    GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GOFLAGS GOOS GOARCH GO111MODULE DOCKER_DEFAULT_PLATFORM \
    COMPOSE_FILE COMPOSE_ENV_FILES COMPOSE_PROFILES COMPOSE_PROGRESS ${!PG@} ${!REDISCLI_@} ${!GREP_@}
export LC_ALL=C GOWORK=off
[[ -w ${TMPDIR:-/tmp} ]] || unset TMPDIR

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

# read_env: exports our settings from its input, as Compose reads them from the file .env. The environment wins. A value
# is text: nothing in it is executed. Outside single quotes, $NAME, ${NAME} and ${NAME:-default} stand for another
# setting, and $$ for a dollar. Unlike Compose, it does not read values of several lines.
ours='^(COMPOSE_PROJECT_NAME|(DESAFIO3|POSTGRES|REDIS)_.*|(WEB_)?PORT|BIND_ADDRESS|CACHE_TTL|DRAIN_SECONDS|LOG_LEVEL)$'
read_env() {
  local line name value known entry other text assignment reference
  # The three bytes are the byte order mark that some editors on Windows write.
  assignment=$'^(\xef\xbb\xbf)?[ \t]*(export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)[ \t]*[=:][ \t]*(.*)$'
  reference='^([^$]*)[$]([$]|([A-Za-z_][A-Za-z0-9_]*)|[{]([A-Za-z_][A-Za-z0-9_]*)(:?-([^}]*))?[}])(.*)$'
  while IFS= read -r line || [[ -n $line ]]; do
    [[ ${line%$'\r'} =~ $assignment ]] || continue
    name=${BASH_REMATCH[3]} value=${BASH_REMATCH[4]} known=''
    case $value in
    \'*) known=$(sed -E "s/^'(([^\\']|\\\\.)*)'.*/\1/; s/\\\\'/'/g" <<<"$value") value='' ;;
    \"*) value=$(printf %b "$(sed -E 's/^"(([^\"]|\\.)*)".*/\1/; s/\\"/"/g; s/\\\$/$$/g' <<<"$value")") ;;
    *) value=$(sed 's/ #.*//; s/[[:space:]]*$//' <<<"$value") ;;
    esac
    while [[ $value =~ $reference ]]; do
      other=${BASH_REMATCH[3]}${BASH_REMATCH[4]} entry=dotenv_$other text='$'
      if [[ -n $other ]]; then text=${!other-${!entry-}}; fi
      known+=${BASH_REMATCH[1]}${text:-${BASH_REMATCH[6]}} value=${BASH_REMATCH[7]}
    done
    printf -v "dotenv_$name" %s "$known$value"
  done
  for entry in ${!dotenv_@}; do
    name=${entry#dotenv_}
    [[ ! $name =~ $ours ]] || export "$name=${!name-${!entry}}"
  done
}

# COMPOSE_DISABLE_ENV_FILE is Compose's own variable.
if [[ -e .env && ! ${COMPOSE_DISABLE_ENV_FILE:-} =~ ^(1|[Tt]) ]]; then read_env <.env; fi

# COMPOSE_PROJECT_NAME and DESAFIO3_STATE give a second stack its own names and folder.
project=${COMPOSE_PROJECT_NAME:-desafio3}
state=${DESAFIO3_STATE:-$PWD/.local} # data, logs and pids of the stack without Docker
marker=$state/made-by-desafio3 # clean.sh removes no folder without this file

# Ctrl-C ends the script, even if the running program (such as docker) catches it and exits normally. So does SIGTERM,
# when the running command has finished.
end_on_signals() { trap 'exit 130' INT && trap 'exit 143' TERM; }
end_on_signals

# at_exit COMMAND: runs it when the script ends, for any reason. Neither another signal nor a failing part stops it.
# shellcheck disable=SC2064 # the argument as it is now
at_exit() { trap "trap '' INT TERM; { $1; } || true" EXIT; }

# ---------------------------------------------------------------- words

bold='' green='' red='' plain=''
if [[ -t 1 ]]; then bold=$'\e[1m' green=$'\e[32m' red=$'\e[31m' plain=$'\e[0m'; fi

title() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
say() { printf '  %s\n' "$*"; }
die() { printf '%serror:%s %s\n' "$red" "$plain" "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

[[ ${DESAFIO3_MODE:-local} =~ ^(local|docker)$ ]] || die "DESAFIO3_MODE must be local or docker, not \"$DESAFIO3_MODE\""

# wait_for SECONDS COMMAND...: tries the command until it succeeds. It fails when the time is over.
wait_for() {
  local deadline=$((SECONDS + $1))
  until "${@:2}"; do
    ((SECONDS < deadline)) || return 1
    sleep 0.1
  done
}

# since START: the time since then, where START is an earlier value of SECONDS. Bash counts whole seconds.
since() { echo "after less than $((SECONDS - $1 + 1)) s"; }

# quietly COMMAND...: runs it, leaves its output in $answer, and shows it only if it fails. run COMMAND...: also shows
# the command.
quietly() { answer=$("$@" 2>&1) || { printf '%s\nthis failed: %s\n' "$answer" "$*" >&2 && return 1; }; }
run() { say "\$$(printf ' %q' "$@")" && quietly "$@"; }

# ---------------------------------------------------------------- requests and claims

# http ARGUMENT...: curl, without a .curlrc and without a proxy.
http() { curl -q --noproxy '*' -sS -m 20 "$@"; }

# request METHOD PATH [JSON]: sends a request to the service and prints a line about the answer, with the body if it is
# an error. It leaves the answer in $status, $body, $cache (the header Cache-Status) and $micros (microseconds). The
# line shows no time if $show_times is empty.
request() {
  local answer head line
  # curl adds a line with the status and the time, even if there was no answer or only a part of it.
  answer=$(http -i -X "$1" ${3:+-H 'Content-Type: application/json' --data-binary "$3"} \
    -w '\n%{http_code} %{time_starttransfer}' "$url$2" 2>&1) || answer=${answer%$'\n'*}$'\n000 20.000000'
  answer=${answer//$'\r'/}
  read -r status micros <<<"${answer##*$'\n'}"
  micros=$((10#${micros/[.,]/})) answer=${answer%$'\n'*}
  head=${answer%%$'\n\n'*} body=${answer#*$'\n\n'} body=${body%$'\n'} cache=''
  if [[ $head =~ Cache-Status:\ ([^$'\n']*) ]]; then cache=${BASH_REMATCH[1]}; fi
  printf -v line '%-6s %-34s %s  %-17s' "$1" "$2" "$status" "$cache"
  if [[ -n ${show_times-yes} ]]; then line+=$(printf ' %6d.%d ms' $((micros / 1000)) $((micros % 1000 / 100))); fi
  if [[ $status == [45]* && ${expected:-} == "$status"* ]]; then line+=' (expected)'; fi
  say "$line"
  if [[ -n ${3:-} ]]; then say "       $3"; fi
  if ! like '2*' "$status"; then say "       $body"; fi
}

# field NAME: the first value with that name in the last answer. A string comes without its quotes and backslashes.
field() {
  [[ $body =~ \"$1\":\ *(\"(([^\"\\]|\\.)*)\"|[^],}\"]*) ]] || return 0
  local value=${BASH_REMATCH[2]:-${BASH_REMATCH[1]#\"\"}}
  printf '%b\n' "${value//\\\"/\"}"
}

is() { [[ $1 == "$2" ]]; }
has() { [[ $1 == *"$2"* ]]; }
not() { ! "$@"; }

# claim WHAT COMMAND...: runs a check, prints whether it succeeded, and counts it. verdict prints the counts at the end.
passed=0 failed=0
claim() {
  if "${@:2}"; then
    passed=$((passed + 1))
    say "${green}ok$plain    $1"
  else
    failed=$((failed + 1))
    say "${red}FAIL$plain  $1"
    printf '        checked: %.400s\n        the last answer: %s %.400s\n' "${*:2}" "${status:-}" "${body:-}"
  fi
}

# expect WHAT ANSWER METHOD PATH [JSON]: sends a request, and claims how status, Cache-Status and body of its answer
# begin: "200" or "200 redis; hit" or, with "*" for anything, '200 *"price":2.00'.
expect() {
  local expected=$2
  request "${@:3}"
  claim "$1" like "$2*" "$status $cache $body"
}
# shellcheck disable=SC2053 # a pattern
like() { [[ $2 == $1 ]]; }

# hit: reads the product $id, and succeeds if the answer came from Redis. cached PRICE: soon it does, with this price.
hit() { request GET "/products/$id" && is "$cache" 'redis; hit'; }
cached() { wait_for 20 hit && is "$(field price)" "$1"; }

# price_is PRICE: the service returns this price for the product $id.
price_is() { request GET "/products/$id" >/dev/null && is "$status $(field price)" "200 $1"; }

# ask WHAT ANSWER sql|redis_cli WORDS...: queries PostgreSQL or Redis directly, and claims the answer.
ask() {
  local answer
  answer=$("${@:3}") || true
  say "${3/_/-}: ${*:4}  ->  ${answer:-(nothing)}"
  claim "$1" like "$2" "$answer"
}

verdict() { printf '\n%d passed, %d failed\n' "$passed" "$failed" && ((failed == 0)); }

# ---------------------------------------------------------------- what must be installed

# Debian keeps PostgreSQL's servers and PgBouncer off the PATH, and so does Homebrew with versions of PostgreSQL. A
# missing folder does no harm.
find_servers() { PATH+=$(printf :%s /usr/sbin /usr/lib/postgresql/*/bin {/opt/homebrew,/usr/local}/opt/postgres*/bin); }
find_servers

redis_server() { command -v redis-server || command -v valkey-server; }

# need PROGRAM[=PACKAGE]...: makes sure that each program is installed, or prints what to install and fails. The
# argument "gcc clang=gcc libc6-dev" asks for either of two programs, or else for two packages. It installs packages
# only as root on a system with apt, where no question is asked.
need() {
  local wanted missing=''
  for wanted; do
    # shellcheck disable=SC2086 # words
    command -v ${wanted%=*} >/dev/null || missing+=" ${wanted#*=}"
  done
  [[ -n $missing ]] || return 0
  if ((EUID != 0)) || ! have apt-get; then
    echo "Not installed:$missing. Use: sudo apt-get install$missing, or: brew install${missing/redis-server/redis}" >&2
    return 1
  fi
  say "Installing$missing ..."
  apt_install "$missing" && find_servers
}

# apt_install PACKAGES: installs them. None of their servers starts, now or at boot, and PostgreSQL creates no cluster.
# Servers that were installed before stay as they are.
apt_install() (
  exec 9</usr/bin/apt-get && flock 9 || exit 1 # one at a time: apt's own lock fails instead of waiting
  policy=/usr/sbin/policy-rc.d clusters=/etc/postgresql-common/createcluster.d/desafio3.conf ours=$clusters
  trap 'rm -f $ours' EXIT
  install -D /dev/stdin "$clusters" <<<'create_main_cluster = false'
  [[ -e $policy ]] || { ours+=" $policy" && install /dev/stdin "$policy" <<<$'#!/bin/sh\nexit 101'; }
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq || true # a source that does not answer may not be the one that is needed
  # shellcheck disable=SC2086 # a list of names
  quietly apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 $1 || exit 1
  for server in $1; do systemctl disable "$server" >/dev/null 2>&1 || true; done # a package's unit has its name
)

# need_servers [PROGRAM[=PACKAGE]...]: makes sure of Go, PostgreSQL, a Redis that is new enough, the few programs that
# these scripts use, and those given.
need_servers() {
  have go || { echo 'Go is needed: https://go.dev/dl/' >&2; return 1; }
  need curl ps=procps postgres=postgresql 'redis-server valkey-server=redis-server' "$@" || return 1
  # It prints "Redis server v=7.0.15 sha=...".
  [[ $("$(redis_server)" --version) =~ \ v=([7-9]|[1-9][0-9]+)\. ]] ||
    { echo "$(redis_server) is too old: Redis 7.0 or newer is needed, or Valkey" >&2; return 1; }
}

port_taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# free_port: a free port below the range that the kernel uses for outgoing connections.
free_port() {
  local port=$((20000 + RANDOM % 12000))
  if port_taken "$port"; then free_port; else echo "$port"; fi
}

# ---------------------------------------------------------------- PostgreSQL and Redis as plain processes

# PostgreSQL refuses to run as root. Its user may not be allowed into the current folder, so it runs in another one.
as_postgres() { if ((EUID == 0)); then (cd / && exec runuser -u postgres -- "$@"); else "$@"; fi; }

# start_postgres: starts PostgreSQL on port POSTGRES_PORT of 127.0.0.1, unless it already runs, and returns when it
# answers. Its data and log are in $state. The first start creates a cluster and a database for POSTGRES_USER,
# POSTGRES_PASSWORD and POSTGRES_DB.
start_postgres() {
  local status home=$state/postgres
  if [[ ! -e $home ]] && ! as_postgres test -x "$state"; then
    # The user postgres may not enter a folder above $state, so the data goes elsewhere.
    ln -s "$(mktemp -d /var/lib/desafio3-postgres.XXXXXX)" "$home" || return 1
  fi
  mkdir -p "$home" && home=$(cd -P "$home" && pwd) && chown "$(as_postgres id -u)" "$home" || return 1
  # After a crash of the machine, another process may have the pid that the status shows. So the port is checked, too.
  status=$(as_postgres pg_ctl -D "$home/data" status 2>&1) || true
  if has "$status" "port=$POSTGRES_PORT" && port_taken "$POSTGRES_PORT"; then return 0; fi
  # A server whose data was removed notices that within a minute, and exits.
  ! port_taken "$POSTGRES_PORT" || say "Waiting for port $POSTGRES_PORT ..."
  wait_for 90 not port_taken "$POSTGRES_PORT" || true
  {
    if [[ ! -e $home/data ]]; then
      # Created under another name, so that a cluster called "data" is always complete. initdb reads the password from a
      # file, which here is a pipe opened by its own user.
      rm -rf "$home/new"
      # shellcheck disable=SC2016 # the inner shell's words
      as_postgres bash -c 'initdb --pwfile=<(cat) "$@"' initdb -D "$home/new" -U "$POSTGRES_USER" \
        -E UTF8 --no-locale -A scram-sha-256 <<<"$POSTGRES_PASSWORD" &&
        as_postgres postgres --single -D "$home/new" postgres <<<"CREATE DATABASE \"$POSTGRES_DB\"" &&
        mv "$home/new" "$home/data"
    fi &&
      as_postgres pg_ctl -D "$home/data" -t 120 start </dev/null \
        -o "-c listen_addresses=127.0.0.1 -c port=$POSTGRES_PORT -c unix_socket_directories="
  } >>"$state/postgres.log" 2>&1 || { tail -n 20 "$state/postgres.log" >&2; return 1; }
}

# stop_postgres: returns when the server has stopped.
stop_postgres() {
  local data
  data=$(cd -P "$state/postgres/data" 2>/dev/null && pwd) || return 0 # it was never started
  { as_postgres pg_ctl -D "$data" -m fast -t 180 stop || ! as_postgres pg_ctl -D "$data" status; } >/dev/null 2>&1
}

# start_redis: does the same for Redis, with REDIS_PORT, REDIS_PASSWORD and the settings of docker-compose.yml.
start_redis() {
  if alive "$state/redis.pid" "-server 127.0.0.1:$REDIS_PORT"; then return 0; fi
  mkdir -p "$state/redis"
  { (cd "$state/redis" && "$(redis_server)" --bind 127.0.0.1 --port "$REDIS_PORT" --requirepass "$REDIS_PASSWORD" \
    --save '60 1' --stop-writes-on-bgsave-error no --maxmemory 64mb --maxmemory-policy volatile-lru \
    --daemonize yes --pidfile ../redis.pid --logfile ../redis.log >/dev/null) &&
    wait_for 60 local_redis -e ping >/dev/null 2>&1; } || { tail -n 20 "$state/redis.log" >&2; return 1; }
}
stop_redis() { end_process "$state/redis.pid" '-server 127.0.0.1:' 30; }
pause_redis() { kill -STOP "$(<"$state/redis.pid")"; }
unpause_redis() { kill -CONT "$(<"$state/redis.pid")"; }

# local_redis COMMAND...: sends it with redis-cli to the Redis that start_redis started.
local_redis() {
  ${REDIS_PASSWORD:+env} ${REDIS_PASSWORD:+"REDISCLI_AUTH=$REDIS_PASSWORD"} \
    "$(redis_server | sed 's/server$/cli/')" -h 127.0.0.1 -p "$REDIS_PORT" "$@"
}

# alive PIDFILE NAME: the process with this pid runs, and its command line contains NAME.
alive() { has "$(ps -ww -p "$(cat "$1" 2>/dev/null)" -o command= 2>/dev/null)" "$2"; }

# end_process PIDFILE NAME SECONDS: sends SIGTERM, even to a paused process, and SIGKILL if it still runs after SECONDS.
end_process() {
  if alive "$1" "$2"; then
    kill -CONT "$(<"$1")" && kill -TERM "$(<"$1")"
    wait_for "$3" not alive "$1" "$2" || kill -KILL "$(<"$1")"
    wait_for 10 not alive "$1" "$2" || return 1
  fi
  rm -f "$1"
}

# ---------------------------------------------------------------- the stack, with Docker or without

# remote_engine: succeeds if Docker's engine is on another machine, and prints where. It does not connect to it.
remote_engine() {
  local engine='' here='^(unix|npipe):|^tcp://(localhost|127[.]|\[::1])'
  engine=$(docker context inspect -f '{{.Endpoints.docker.Host}}' 2>/dev/null) || true
  [[ -n $engine && ! $engine =~ $here ]] && echo "$engine"
}

# why_not_docker: prints what is wrong with Docker and how to fix it, a line each, or nothing if Docker works. Compose
# 2.17 was the first to have --wait-timeout.
why_not_docker() {
  local said
  if ! have docker; then
    why 'Docker is not installed.' 'install it: https://docs.docker.com/get-docker/'
  elif said=$(remote_engine); then
    why "The Docker engine is on another machine, $said." 'unset DOCKER_HOST DOCKER_CONTEXT; docker context use default'
  elif ! said=$(docker info 2>&1); then
    case $said in
    *denied*) why 'You have no permission to use Docker.' "sudo usermod -aG docker $(id -un), then log out and in" ;;
    *running*) why 'The Docker engine is not running.' 'start Docker Desktop, or: sudo systemctl start docker' ;;
    *) why "Docker does not work: ${said##*$'\n'}" 'docker info shows more' ;;
    esac
  elif ! has "$(docker compose up --help 2>&1)" --wait-timeout; then
    why 'Docker Compose 2.17 or newer is missing.' 'install the plugin: https://docs.docker.com/compose/install/'
  else
    sed -nE 's/^(FROM| *image:) +([^ $]+:[^ ]+).*/\2/p' Dockerfile docker-compose.yml | while read -r image; do
      docker image inspect "$image" >/dev/null 2>&1 || docker pull "$image" >&2 ||
        { why "The image $image is not here and cannot be downloaded." "docker pull $image shows why"; return; }
    done
  fi
}
why() { printf '%s\nTo fix it: %s\n' "$@"; }

# project_label: filters Docker's lists down to this project's.
project_label="label=com.docker.compose.project=$project"

# compose_containers: the names of the running containers of all Compose stacks, in one line. swarm_state: active or
# inactive.
compose_containers() { docker ps -f label=com.docker.compose.project --format '{{.Names}}' | paste -s -d ' ' -; }
swarm_state() { docker info -f '{{.Swarm.LocalNodeState}}'; }

# in_docker NAME: the containers, volumes, networks and images whose names begin with it.
in_docker() { { docker ps -a && docker volume ls && docker network ls && docker images; } | grep "$1[-_]" || true; }

# find_mode: sets $mode to "local" or "docker", whichever stack exists, or to nothing. DESAFIO3_MODE decides if it is
# set. If the engine is on another machine, the script ends: that engine has neither our ports nor our files.
find_mode() {
  local containers=''
  mode=${DESAFIO3_MODE:-}
  if is "$mode" local; then return; fi
  if [[ -z $mode && -e $marker && -e $state/env ]]; then mode=local; fi # start.sh makes the files, stop.sh removes env
  if ! remote_engine >/dev/null; then
    containers=$(docker ps -a -f "$project_label" --format '{{.State}}' 2>/dev/null) || true
  elif ! is "$mode" local; then
    die "$(why_not_docker)"$'\n'"Or work without Docker: DESAFIO3_MODE=local $0"
  fi
  mode=${mode:-${containers:+docker}}
  if is "$mode" local && has "$containers" running; then
    say 'Two stacks are running. This uses the one without Docker. DESAFIO3_MODE=docker selects the other one.' >&2
  fi
}

# own_stack: ends the script if our containers were created in another folder, such as another clone. Compose notes the
# folder on each container. A folder that no longer exists owns nothing.
own_stack() {
  local folder
  folder=$(docker ps -af "$project_label" --format '{{.Label "com.docker.compose.project.working_dir"}}' | head -n 1)
  [[ ! -e $folder || $folder -ef $PWD ]] || die "the stack $project belongs to $folder. Work there, or give this one
  a name and ports of its own: COMPOSE_PROJECT_NAME=$project-2 WEB_PORT=8001 POSTGRES_PORT=5433 REDIS_PORT=6380 $0"
}

not_running() { die 'the stack is not running: start it with ./scripts/start.sh'; }

# attach: finds the running stack, and sets $mode and $url.
attach() {
  find_mode
  if is "$mode" local; then
    # shellcheck source=/dev/null
    source "$state/env" 2>/dev/null || not_running # its ports and passwords
    alive "$state/web.pid" "$state/web" || die 'the service has ended: ./scripts/logs.sh web says why'
    url=$BIND_ADDRESS:$WEB_PORT
  else
    [[ -n $mode ]] || not_running
    own_stack
    url=$(docker port "$project-web" 8000 2>/dev/null | head -n 1) || not_running
  fi
  # An IPv6 address such as ::1 needs brackets in a URL. 0.0.0.0 and [::] include this machine's own address.
  if [[ $url == *:*:* && $url != \[* ]]; then url="[${url%:*}]:${url##*:}"; fi
  url=${url/#0.0.0.0/127.0.0.1} url=http://${url/#\[::]/[::1]}
}

# own_folder: ends the script if start.sh did not create the folder with the data.
own_folder() { [[ -e $marker ]] || die "$state is left alone: without ${marker##*/} it is not from start.sh"; }

# stop_local: stops the stack without Docker and keeps its data.
stop_local() {
  [[ -e $state ]] || return 0
  own_folder
  { end_process "$state/web.pid" "$state/web" 15 && stop_redis && stop_postgres; } || die "part of $state still runs"
  rm -f "$state/env"
}

# show_stack: shows what runs. STAT T means that a process is paused.
show_stack() {
  if is "$mode" local; then
    ps -o pid,stat,etime,args -p "$(grep -hsm 1 . "$state"/{postgres/data/postmaster,redis,web}.pid | paste -sd , -)" |
      cut -c -100
  else
    docker ps -a -f "$project_label" --format 'table {{.Names}}\t{{.Status}}\t{{.Ports}}'
  fi | sed 's/^/  /'
}

# docker_agrees: no container is unhealthy or starting, according to Docker's own health checks, which lag by some
# seconds.
docker_agrees() { [[ ! $(docker ps -f "$project_label" --format '{{.Status}}' 2>/dev/null) =~ unhealthy|starting ]]; }

# not_healthy: shows the containers and their logs, and ends the script.
not_healthy() {
  show_stack
  docker compose logs --tail 100 2>&1 | grep -v path=/health || true
  die 'the stack did not become healthy'
}

# postgres_client psql|pg_dump ARGUMENT...: runs it on the stack's database. In the container it connects to the
# network's address, because a local connection would need no password.
postgres_client() {
  if is "$mode" local; then
    PGPASSWORD=$POSTGRES_PASSWORD "$1" -h 127.0.0.1 -p "$POSTGRES_PORT" -U "$POSTGRES_USER" -d "$POSTGRES_DB" "${@:2}"
  else
    # shellcheck disable=SC2016 # the container's own variables
    docker exec -i "$project-postgres" sh -c \
      'PGPASSWORD=$POSTGRES_PASSWORD "$0" -h "$HOSTNAME" -U "$POSTGRES_USER" -d "$POSTGRES_DB" "$@"' "$@"
  fi
}

# sql QUERY: prints the bare result.
sql() { postgres_client psql -XqtAc "$1" </dev/null; }

# redis_cli COMMAND...: prints the answer of the stack's Redis.
redis_cli() { if is "$mode" local; then local_redis "$@"; else docker exec "$project-redis" redis-cli "$@"; fi; }

# control stop|start|pause|unpause postgres|redis: does it to one server, and under Docker shows the command for it.
# Without Docker, only Redis can be paused.
control() { if is "$mode" docker; then run docker "$1" "$project-$2"; else say "$1 $2" && "$1_$2"; fi; }

# cache_in_use: the service trusts the cache, which it does a moment after it has connected to Redis. need_cache waits
# for that, and ends the script if it does not happen.
cache_in_use() { request GET /stats >/dev/null && has "$body" '"trusted":true'; }
need_cache() { wait_for 20 cache_in_use || die 'the service does not use its cache: ./scripts/logs.sh web says why'; }

# create_product WHAT JSON: claims that a product is created, and leaves its id in $id. If that fails, the script ends.
# Ctrl-C is ignored meanwhile, or a product with an unknown id could be left behind.
id=''
create_product() {
  trap '' INT TERM
  expect "$1" 201 POST /products "$2"
  id=$(field id)
  end_on_signals
  [[ -n $id ]] || die 'without a product there is nothing to show'
}

# delete_product: for at_exit. It deletes the product, unless the script already has, as soon as the service can.
delete_product() { [[ -z $id ]] || wait_for 60 deleted || say "product $id could not be deleted"; }
deleted() { request DELETE "/products/$id" >/dev/null && like '[24]04' "$status"; }

#!/usr/bin/env bash
# Measures the service against the limit: a bare net/http handler that writes the same bytes from memory, on the same
# machine, turn by turn in the same run. It starts a PostgreSQL, a Redis and a service of its own on 127.0.0.1, and
# stops them again; nothing that runs already is touched. It takes about eight minutes.
#
#   scripts/bench.sh                    the whole
#   SECONDS_EACH=1 scripts/bench.sh     each measurement takes a second instead of two
#   ROUNDS=1 GROWTH= scripts/bench.sh   one round instead of three, and no large catalogues
#   LOG_LEVEL=info scripts/bench.sh     with the access log (into a file)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/lib.sh

seconds=${SECONDS_EACH:-2}
rounds=${ROUNDS:-3}
growth=${GROWTH-8 1000 10000 100000}
export LOG_LEVEL=${LOG_LEVEL:-warn}

progress() { printf '%s\n' "$*" >&2; }

need_servers
need wrk psql redis-cli
dir=$(mktemp -d)
chmod 711 "$dir" # PostgreSQL may run as another user
pids=()

finish() {
	trap - EXIT INT TERM
	for pid in "${pids[@]}"; do
		kill "$pid" 2>/dev/null || true
		wait "$pid" 2>/dev/null || true
	done
	remove_servers "$dir"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# --- what is measured --------------------------------------------------------------------------------------------

progress "building, starting PostgreSQL and Redis ..."
# As the Dockerfile builds it, so that the size is that of the image.
CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o "$dir/web" .

# The limit, the textbook way to update, and two stopwatches: a program outside of the service, with the same drivers.
mkdir "$dir/helper"
cp go.mod go.sum "$dir/helper"
cat >"$dir/helper/main.go" <<'GO'
package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/gomodule/redigo/redis"
	"github.com/lib/pq"
)

func main() {
	args := os.Args[2:]
	switch os.Args[1] {
	case "bare":
		bare(args[0], args[1], args[2])
	case "textbook":
		textbook(args[0])
	case "startup":
		startup(args[0], args[1])
	case "cold":
		cold(args[0])
	}
}

// bare asks the service once for each body, and from then on writes the same bytes from memory.
func bare(address, service, ids string) {
	bodies := map[string][]byte{}
	for _, path := range []string{"/products", "/products?limit=20"} {
		bodies[path] = get(service + path)
	}
	last, _ := strconv.Atoi(ids)
	for id := 1; id <= last; id++ {
		path := "/products/" + strconv.Itoa(id)
		bodies[path] = get(service + path)
	}
	log.Fatal(http.ListenAndServe(address, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path := r.URL.Path
		if r.URL.RawQuery != "" {
			path += "?" + r.URL.RawQuery
		}
		status := http.StatusOK
		if r.Method != http.MethodGet {
			io.Copy(io.Discard, r.Body)
		}
		if r.Method == http.MethodPost {
			path, status = "/products/1", http.StatusCreated
		}
		body := bodies[path]
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.WriteHeader(status)
		w.Write(body)
	})))
}

func get(url string) []byte {
	response, err := http.Get(url)
	if err != nil {
		log.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		log.Fatal(err)
	}
	return body
}

type product struct {
	ID          int64       `json:"id"`
	Name        string      `json:"name"`
	Description string      `json:"description"`
	Price       json.Number `json:"price"`
	Stock       int64       `json:"stock"`
	Category    string      `json:"category"`
	CreatedAt   time.Time   `json:"created_at"`
	UpdatedAt   time.Time   `json:"updated_at"`
}

func (p *product) scan(row *sql.Row) error {
	return row.Scan(&p.ID, &p.Name, &p.Description, &p.Price, &p.Stock, &p.Category, &p.CreatedAt, &p.UpdatedAt)
}

func openDB() *sql.DB {
	connector, err := pq.NewConnector("host=127.0.0.1 sslmode=disable binary_parameters=yes application_name=desafio3 port=" +
		os.Getenv("POSTGRES_PORT") + " user=" + os.Getenv("POSTGRES_USER") + " password='" + os.Getenv("POSTGRES_PASSWORD") + "' dbname=" + os.Getenv("POSTGRES_DB"))
	if err != nil {
		log.Fatal(err)
	}
	return sql.OpenDB(connector)
}

// textbook updates as every tutorial does: SELECT the row, change it, BEGIN, UPDATE, COMMIT, DEL the keys; with pools
// and statements like the service's.
func textbook(address string) {
	size := 4 + 4*runtime.GOMAXPROCS(0)
	db := openDB()
	db.SetMaxOpenConns(size)
	db.SetMaxIdleConns(size)
	pool := &redis.Pool{MaxActive: size, MaxIdle: size, Wait: true, Dial: func() (redis.Conn, error) {
		return redis.Dial("tcp", "127.0.0.1:"+os.Getenv("REDIS_PORT"))
	}}
	const columns = `id, name, description, price, stock, category, created_at, updated_at`
	update := func(r *http.Request) (p product, err error) {
		if err = p.scan(db.QueryRowContext(r.Context(), `SELECT `+columns+` FROM products WHERE id = $1`, r.PathValue("id"))); err != nil {
			return p, err
		}
		if err = json.NewDecoder(r.Body).Decode(&p); err != nil {
			return p, err
		}
		tx, err := db.BeginTx(r.Context(), nil)
		if err != nil {
			return p, err
		}
		defer tx.Rollback()
		if err = p.scan(tx.QueryRowContext(r.Context(), `UPDATE products SET name = $2, description = $3, price = $4, stock = $5, category = $6, updated_at = now() WHERE id = $1 RETURNING `+columns,
			p.ID, p.Name, p.Description, p.Price, p.Stock, p.Category)); err != nil {
			return p, err
		}
		if err = tx.Commit(); err != nil {
			return p, err
		}
		conn := pool.Get()
		defer conn.Close()
		_, err = conn.Do("DEL", "products:all", "products:"+r.PathValue("id"))
		return p, err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("PUT /products/{id}", func(w http.ResponseWriter, r *http.Request) {
		p, err := update(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(p)
	})
	log.Fatal(http.ListenAndServe(address, mux))
}

// startup prints the median of how many milliseconds the service takes to its first 200, both servers being up.
func startup(binary, url string) {
	var took []float64
	for range 9 {
		began := time.Now()
		cmd := exec.Command(binary)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			log.Fatal(err)
		}
		for {
			response, err := http.Get(url)
			if err == nil {
				response.Body.Close()
				if response.StatusCode == http.StatusOK {
					break
				}
			}
			if time.Since(began) > 10*time.Second {
				log.Fatal("not ready in 10 s")
			}
			time.Sleep(time.Millisecond)
		}
		took = append(took, time.Since(began).Seconds()*1000)
		http.DefaultClient.CloseIdleConnections()
		cmd.Process.Signal(os.Interrupt)
		cmd.Wait()
	}
	slices.Sort(took)
	fmt.Printf("%.0f ms (slowest of 9: %.0f ms)\n", took[4], took[8])
}

// cold empties the cache and then has 64 readers ask for the list at the same moment, again and again, and prints the most
// queries that PostgreSQL got for it.
func cold(service string) {
	db := openDB()
	if _, err := db.Exec(`CREATE EXTENSION IF NOT EXISTS pg_stat_statements`); err != nil {
		fmt.Println("unknown (pg_stat_statements is not installed)")
		return
	}
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}
	most, sum := 0, 0
	const rounds = 50
	for round := range rounds + 1 {
		request, _ := http.NewRequestWithContext(context.Background(), http.MethodDelete, service+"/cache/clear", nil)
		response, err := client.Do(request)
		if err != nil {
			log.Fatal(err)
		}
		io.Copy(io.Discard, response.Body)
		response.Body.Close()
		if _, err := db.Exec(`SELECT pg_stat_statements_reset()`); err != nil {
			log.Fatal(err)
		}
		var wait sync.WaitGroup
		start := make(chan bool)
		for range 64 {
			wait.Go(func() {
				<-start
				response, err := client.Get(service + "/products")
				if err != nil {
					log.Fatal(err)
				}
				io.Copy(io.Discard, response.Body)
				response.Body.Close()
			})
		}
		close(start)
		wait.Wait()
		var queries int
		if err := db.QueryRow(`SELECT coalesce(sum(calls), 0) FROM pg_stat_statements WHERE query LIKE '%FROM products%ORDER BY id%'`).Scan(&queries); err != nil {
			log.Fatal(err)
		}
		if round > 0 { // the first only opens the connections
			most, sum = max(most, queries), sum+queries
		}
	}
	fmt.Printf("at most %d, on average %.1f\n", most, float64(sum)/rounds)
}
GO
(cd "$dir/helper" && go build -o ../bench .)

export POSTGRES_ARGS='-c shared_preload_libraries=pg_stat_statements'
private_servers "$dir"
web_port=$(free_port)
export PORT=$web_port
bare_port=$(free_port)
textbook_port=$(free_port)
web=http://127.0.0.1:$web_port bare=http://127.0.0.1:$bare_port textbook=http://127.0.0.1:$textbook_port

# For sql and cache_in_use.
mode=local url=$web

# products N replaces the catalogue by N products, and waits until the cache is in use again.
products() {
	sql "TRUNCATE products RESTART IDENTITY;
	     INSERT INTO products (name, description, price, stock, category)
	     SELECT 'Product ' || n, 'A product like any other, with a description of a usual length.', n % 1000 + 0.99, n % 100, 'category ' || n % 10
	     FROM generate_series(1, $1) n" && sql "VACUUM ANALYZE products"
	sleep 1 # until all notifications are there, so that no trust is about to end again
	wait_for 10 cache_in_use || die 'the cache is not in use after 10 s'
}

start_web() {
	"$dir/web" 2>>"$dir/web.log" &
	web_pid=$!
	pids+=("$web_pid")
	wait_for 10 curl -sf -o "$dir/answer" "$web/health" || die "the service does not answer: $(tail "$dir/web.log")"
}

# peak prints the most memory that the service has had since it started.
peak() { awk '/VmHWM/ { printf "%.1f MiB", $2 / 1024 }' "/proc/$web_pid/status"; }

# --- the load ----------------------------------------------------------------------------------------------------

# One script for all: METHOD and PATH from the command line, where ID stands for a random id from 1 to IDS.
cat >"$dir/load.lua" <<'LUA'
local threads = 0
function setup(thread)
	threads = threads + 1
	thread:set("number", threads)
end

function init(args)
	local method, path, ids = args[1], args[2], tonumber(args[3])
	local headers, body = {}, nil
	math.randomseed(os.time() * 100 + number)
	local requests = {}
	for id = 1, ids do
		if method ~= "GET" then
			headers["Content-Type"] = "application/json"
			body = string.format('{"name":"Product %d","price":%d.%02d,"stock":%d}', id, id, id % 100, math.random(1000))
		end
		requests[id] = wrk.format(method, (path:gsub("ID", id)), headers, body)
	end
	request = function() return requests[math.random(ids)] end
end

function done(summary, latency)
	local e = summary.errors
	print("RESULT", string.format("%.0f", summary.requests / summary.duration * 1e6),
		string.format("%.2f", latency:percentile(50) / 1000), string.format("%.2f", latency:percentile(99) / 1000),
		e.connect + e.read + e.write + e.status + e.timeout)
end
LUA

# load URL CLIENTS METHOD PATH IDS prints requests a second, p50 and p99 in ms, and the number of errors.
load() {
	wrk -t "$(($2 < 2 ? 1 : 2))" -c "$2" -d "$seconds" --timeout 30 -s "$dir/load.lua" "$1" -- "${@:3}" | awk '/^RESULT/ { print $2, $3, $4, $5 }'
}

step=0
# measure NAME TARGET CLIENTS URL METHOD PATH IDS appends a line to the results.
measure() {
	local result
	result=$(load "$4" "$3" "${@:5}")
	step=$((step + 1))
	printf '%s|%s|%s|%s\n' "$1" "$2" "$3" "${result// /|}" >>"$dir/results"
	printf '\r\033[K%d of %d: %s, %s, %s clients: %s a second' "$step" "$steps" "$1" "$2" "$3" "${result%% *}" >&2
	if [ "${result##* }" != 0 ]; then
		progress ""
		progress "  of these requests, ${result##* } failed"
	fi
}

# both NAME METHOD PATH IDS measures the bare handler and the service in turn.
both() {
	for clients in 1 64 256; do
		measure "$1" bare "$clients" "$bare" "${@:2}"
		measure "$1" service "$clients" "$web" "${@:2}"
	done
}

# start_bare IDS has the bare handler take the list, a page and IDS products from the service as they are now.
start_bare() {
	if [ -n "${bare_pid:-}" ]; then
		kill "$bare_pid"
		wait "$bare_pid" || true
	fi
	"$dir/bench" bare "127.0.0.1:$bare_port" "$web" "$1" &
	bare_pid=$!
	pids+=("$bare_pid")
	wait_for 10 curl -sf -o "$dir/answer" "$bare/products" || die 'the bare handler does not answer'
}

start_web
"$dir/bench" textbook "127.0.0.1:$textbook_port" &
pids+=($!)
steps=$((rounds * 3 * 14))

products 8
start_bare 8
for _ in $(seq "$rounds"); do
	both "cached list of 8" GET /products 1
	both "cached products, 8 ids" GET /products/ID 8
	redis-cli -h 127.0.0.1 -p "$REDIS_PORT" -r -1 -i 0.005 DEL products:all >/dev/null &
	clearing=$!
	pids+=("$clearing")
	for clients in 1 64 256; do
		measure "list, cleared 200 times a second" service "$clients" "$web" GET /products 1
	done
	kill "$clearing"
	wait "$clearing" 2>/dev/null || true
done
cold=$("$dir/bench" cold "$web")
peak_8=$(peak)

products 1000
start_bare 1000
for _ in $(seq "$rounds"); do
	both "cached products, 1,000 ids" GET /products/ID 1000
	both "page of 20, not cached" GET "/products?limit=20" 1
	both "creation" POST /products 1
	for clients in 1 64 256; do
		measure "update" bare "$clients" "$bare" PUT /products/ID 1000
		measure "update" textbook "$clients" "$textbook" PUT /products/ID 1000
		measure "update" service "$clients" "$web" PUT /products/ID 1000
	done
done
peak_1000=$(peak)
progress ""

startup_port=$(free_port)
startup=$(PORT=$startup_port "$dir/bench" startup "$dir/web" "http://127.0.0.1:$startup_port/health")

# --- the table ---------------------------------------------------------------------------------------------------

echo "$(nproc) x $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), $(go version | cut -d' ' -f3), LOG_LEVEL=$LOG_LEVEL, medians of $rounds rounds of $seconds s"
echo
printf '%-34s %7s  %27s  %27s  %5s\n' "" "" "--- bare handler ----------" "--- service ---------------" ""
printf '%-34s %7s  %9s %8s %8s  %9s %8s %8s  %5s\n' "" clients "a second" "p50 ms" "p99 ms" "a second" "p50 ms" "p99 ms" ratio
awk -F'|' '
function median(name, field,    n, i, j, t, v, parts) {
	n = split(values[name, field], parts, " ")
	for (i = 1; i <= n; i++) v[i] = parts[i] + 0
	for (i = 2; i <= n; i++) for (j = i; j > 1 && v[j] < v[j-1]; j--) { t = v[j]; v[j] = v[j-1]; v[j-1] = t }
	return v[int((n + 1) / 2)]
}
function row(label, clients, reference, service) {
	printf "%-34s %7s  %9d %8.2f %8.2f  %9d %8.2f %8.2f  %5.2f\n", label, clients,
		median(reference, 4), median(reference, 5), median(reference, 6),
		median(service, 4), median(service, 5), median(service, 6), median(service, 4) / median(reference, 4)
}
{
	if (!($1 in known)) { known[$1]; order[++names] = $1 }
	for (f = 4; f <= 6; f++) values[$1 "|" $2 "|" $3, f] = values[$1 "|" $2 "|" $3, f] " " $f
}
END {
	for (i = 1; i <= names; i++) for (k = 1; k <= split("1 64 256", clients, " "); k++) {
		name = order[i]; c = clients[k]
		row(name, c, (name ~ /^list, cleared/ ? "cached list of 8" : name) "|bare|" c, name "|service|" c)
	}
	print "\nan update through SELECT, BEGIN, UPDATE, COMMIT, DEL instead of the bare handler:"
	for (k = 1; k <= 3; k++) row("update", clients[k], "update|textbook|" clients[k], "update|service|" clients[k])
}' "$dir/results"
echo
echo "queries for a cold list, 64 readers: $cold"
echo "peak memory with 8 products:         $peak_8"
echo "peak memory with 1,000 and more:     $peak_1000"
echo "start-up to the first 200:           $startup"
echo "binary:                              $(stat -c %s "$dir/web" | awk '{ printf "%.1f MB", $1 / 1e6 }')"

# --- how the cost grows ------------------------------------------------------------------------------------------

if [ -n "$growth" ]; then
	echo
	printf '%9s  %22s  %22s  %42s  %11s\n' "" "product by id, 64" "page of 20, 64 clients" "whole list, 256 clients" ""
	printf '%9s  %10s %11s  %10s %11s  %10s %10s %9s %10s  %11s\n' products "a second" "p99 ms" "a second" "p99 ms" "bytes" "a second" "MB/s" "p50 ms" "peak memory"
fi
for n in $growth; do
	kill "$web_pid"
	wait "$web_pid" || true
	start_web # for its peak memory
	products "$n"
	progress "$n products ..."
	read -r id_rate _ id_p99 _ < <(load "$web" 64 GET /products/ID "$((n < 1000 ? n : 1000))")
	read -r page_rate _ page_p99 _ < <(load "$web" 64 GET "/products?limit=20&after=$((n / 2))" 1)
	bytes=$(curl -s "$web/products" | wc -c)
	read -r rate p50 _ failed < <(seconds=$((n < 100000 ? seconds : 20)) && load "$web" 256 GET /products 1)
	printf '%9d  %10s %11s  %10s %11s  %10d %10s %9d %10s  %11s\n' "$n" "$id_rate" "$id_p99" "$page_rate" "$page_p99" "$bytes" "$rate" "$((bytes * rate / 1000000))" "$p50" "$(peak)"
	if [ "$failed" != 0 ]; then progress "  $failed of the requests for the whole list failed"; fi
done
if [ -n "$growth" ]; then
	echo
	echo "the plans with $n products:"
	for rows in "WHERE id = $((n / 2))" "WHERE id > $((n / 2)) ORDER BY id LIMIT 21" \
		"WHERE id > 0 AND category = 'category 1' ORDER BY id LIMIT 21" 'ORDER BY id'; do
		sql "EXPLAIN (ANALYZE, COSTS off, TIMING off, SUMMARY off) SELECT * FROM products $rows"
		echo
	done
fi

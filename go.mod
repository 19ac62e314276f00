module desafio3

go 1.26

require (
	github.com/gomodule/redigo v1.9.3
	github.com/lib/pq v1.12.3
)

#!/usr/bin/env bash
# Fills the catalogue with 8 products. It skips names that the catalogue already has, so a second run adds nothing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
attach

# add NAME DESCRIPTION PRICE STOCK CATEGORY
added=0
add() {
  if grep -qxF "$1" <<<"$names"; then return; fi
  json="{\"name\":\"$1\",\"description\":\"$2\",\"price\":$3,\"stock\":$4,\"category\":\"$5\"}"
  request POST /products "$json" >/dev/null
  is "$status" 201 || die "could not create \"$1\": $body"
  say "created: $1 (id $(field id))"
  added=$((added + 1))
}

# SQL instead of GET /products, which would leave a copy in the cache: the next read of the list should be a miss.
names=$(sql 'SELECT name FROM products') || die 'PostgreSQL does not answer'

add 'Smartphone Galaxy' 'Tela AMOLED de 6,1 polegadas, 128 GB e câmera tripla' 2499.90 50 electronics
add 'Notebook Dell' 'Processador Core i7, 16 GB de memória e SSD de 512 GB' 5299.00 20 electronics
add 'Fone de Ouvido Bluetooth' 'Sem fio, com cancelamento de ruído e 30 horas de bateria' 349.90 100 electronics
add 'Clean Code' 'Livro de Robert C. Martin sobre código limpo e boas práticas' 89.90 75 books
add 'Design Patterns' 'Livro clássico sobre padrões de projeto orientado a objetos' 129.90 40 books
add 'Tênis de Corrida' 'Leve e com amortecimento, para treinos e provas de rua' 399.90 60 sports
add 'Bicicleta Mountain Bike' 'Aro 29, 21 marchas e freio a disco' 1899.00 15 sports
add 'Cafeteira Elétrica' 'Prepara até 30 xícaras e mantém o café aquecido' 199.90 35 home

products=$(sql 'SELECT count(*) FROM products')
if ((added == 0)); then say "$products products, nothing to add"; else say "The catalogue holds $products products."; fi

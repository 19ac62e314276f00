package main

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"mime"
	"net/http"
	"net/url"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// A product is what the API shows. Its price is a json.Number, which keeps the digits that PostgreSQL sends for a
// NUMERIC: a float would turn 0.10 into 0.1000000000000000055.
type product struct {
	ID          int64       `json:"id"`
	Name        string      `json:"name"`
	Description string      `json:"description"`
	Price       json.Number `json:"price"`
	Stock       int64       `json:"stock"`
	Category    string      `json:"category"`
	CreatedAt   string      `json:"created_at"`
	UpdatedAt   string      `json:"updated_at"`
}

// columns lists a product's columns in the order in which scan reads them. PostgreSQL writes the dates as the API shows
// them (RFC 3339), because parsing and formatting them here would take a tenth of the time of a page.
const columns = `id, name, description, price, stock, category,
       replace((created_at AT TIME ZONE 'UTC')::text, ' ', 'T') || 'Z',
       replace((updated_at AT TIME ZONE 'UTC')::text, ' ', 'T') || 'Z'`

// scan fills p from a row of columns. The error is classify's: errNotFound if there is no row.
func (p *product) scan(row interface{ Scan(...any) error }) error {
	return classify(row.Scan(&p.ID, &p.Name, &p.Description, &p.Price, &p.Stock, &p.Category,
		&p.CreatedAt, &p.UpdatedAt))
}

// errNotFound says that no product has the requested id.
var errNotFound = fmt.Errorf("no such product: %w", errUnchanged)

// statements are the ones that each connection of the request pool prepares.
var statements = []string{
	selectList, selectPage, selectCategoryPage, selectProduct, insertProduct, updateProduct, deleteProduct,
}

// ---------------------------------------------------------------- lists

// An answer stops at about maxAnswer bytes, so that no catalogue needs more memory than the service has. minProduct is
// a lower bound for the bytes that a product takes besides its text.
const (
	maxAnswer  = 4 << 20
	minProduct = "140"
	maxRows    = maxAnswer / 140
)

// selectList leaves out the rows that would begin after $3 bytes, because the service would discard them.
const selectList = `
SELECT ` + columns + `
FROM (SELECT *, sum(` + minProduct + ` + octet_length(name) + octet_length(description) + octet_length(category))
                OVER (ORDER BY id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS bytes_before
      FROM products
      WHERE id > $1
      ORDER BY id
      LIMIT $2) AS list
WHERE coalesce(bytes_before, 0) <= $3
ORDER BY id`

const selectPage = `
SELECT ` + columns + `
FROM products
WHERE id > $1
ORDER BY id
LIMIT $2`

// selectCategoryPage is a separate statement. With "category = $3 OR $3 IS NULL" in selectPage, PostgreSQL could not
// use the index on categories.
const selectCategoryPage = `
SELECT ` + columns + `
FROM products
WHERE id > $1 AND category = $3
ORDER BY id
LIMIT $2`

// encodePage reads a page from PostgreSQL and returns it as JSON: "count", "products" and, if there are more, "next".
// It encodes row by row, because collecting the products in a slice first would double the memory.
func (s *server) encodePage(ctx context.Context, p page) ([]byte, error) {
	// One extra row shows whether there is a next page.
	query, args := selectPage, []any{p.after, p.limit + 1}
	switch {
	case p.category != nil:
		query, args = selectCategoryPage, append(args, *p.category)
	case p.limit > maxPage:
		query, args = selectList, append(args, maxAnswer)
	}
	rows, err := s.db.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var products bytes.Buffer
	enc, count, next := newEncoder(&products), int64(0), ""
	for last := p.after; rows.Next(); {
		var one product
		if err := one.scan(rows); err != nil {
			return nil, err
		}
		before := products.Len()
		if err := enc.Encode(&one); err != nil {
			return nil, err
		}
		if count == p.limit || before > 0 && products.Len() > maxAnswer {
			products.Truncate(before)
			next = p.next(last)
			break
		}
		products.Bytes()[products.Len()-1] = ',' // replaces the encoder's newline
		count, last = count+1, one.ID
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	body := fmt.Appendf(make([]byte, 0, products.Len()+200), `{"count":%d,"products":[`, count)
	body = append(body, bytes.TrimSuffix(products.Bytes(), []byte(","))...)
	body = append(body, ']')
	if next != "" {
		body = fmt.Appendf(body, `,"next":"%s"`, next) // an encoded query contains nothing that JSON must escape
	}
	return append(body, "}\n"...), nil
}

// listProducts answers GET /products: the whole list from the cache, or a page from PostgreSQL. Pages are not cached:
// there are too many different ones, and each write would have to delete them all.
func (s *server) listProducts(w http.ResponseWriter, r *http.Request) error {
	if r.URL.RawQuery == "" {
		return s.respondCached(w, r, keyAll, func(ctx context.Context) ([]byte, error) {
			return s.encodePage(ctx, page{limit: maxRows})
		})
	}
	p, err := parsePage(r.URL.RawQuery)
	if err != nil {
		return err
	}
	return s.respondBody(w, r, func() ([]byte, error) {
		ctx, cancel := context.WithTimeout(r.Context(), poolTimeout)
		defer cancel()
		return s.encodePage(ctx, p)
	})
}

// A thousand slow clients must not hold a thousand large bodies. So the service sends at most maxLarge answers over
// largeAnswer bytes at once, and receives at most maxLarge bodies over largeRequest bytes. Each occupies a slot for as
// long as its client reads or sends. A request waits up to slotTimeout for a slot.
const (
	largeAnswer  = 256 << 10
	largeRequest = 16 << 10
	maxLarge     = 12
	slotTimeout  = 12 * time.Second
)

// takeSlot takes one of the slots. It waits while all are taken, until the context ends.
func takeSlot(ctx context.Context, slots chan struct{}) error {
	select {
	case slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(slotTimeout):
		return problemf(http.StatusServiceUnavailable, "too many large bodies are on their way")
	}
}

// respondBody answers with the body that build returns. If a large body has to wait for its turn, respondBody drops it
// and builds it again afterwards.
func (s *server) respondBody(w http.ResponseWriter, r *http.Request, build func() ([]byte, error)) error {
	for itsTurn := false; ; {
		body, err := build()
		if errors.Is(err, errRepeat) {
			continue // each errRepeat has dropped a connection from the pool, so the loop ends
		}
		if err != nil {
			return err
		}
		if len(body) > largeAnswer && !itsTurn {
			select {
			case s.largeAnswers <- struct{}{}:
			default:
				body = nil // not held while this request waits
				if err := takeSlot(r.Context(), s.largeAnswers); err != nil {
					return err
				}
			}
			defer func() { <-s.largeAnswers }()
			itsTurn = true
			if body == nil {
				continue
			}
		}
		respond(w, http.StatusOK, "application/json", body)
		return nil
	}
}

// respondCached answers with the body of key and sets Cache-Status to its source. The bytes are the same whether or not
// they were cached.
func (s *server) respondCached(w http.ResponseWriter, r *http.Request, key string,
	fillFrom func(context.Context) ([]byte, error)) error {
	return s.respondBody(w, r, func() ([]byte, error) {
		body, from, err := s.cache.Get(r.Context(), key, fillFrom)
		w.Header().Set("Cache-Status", string(from))
		return body, err
	})
}

// maxPage is the largest limit of a page, and the default.
const maxPage = 1000

// A page is what a query string asks for: products after an id, in one category or in all. This is keyset pagination.
// "After the last id that you saw" is an index lookup, however deep the page is. It stays correct while other clients
// create and delete products. OFFSET is neither fast on deep pages nor correct.
type page struct {
	after, limit int64
	category     *string
}

// parsePage reads a query string. The parameters are checked in a fixed order, so that the same request always gets the
// same error. The error is a problem.
func parsePage(rawQuery string) (page, error) {
	p := page{limit: maxPage}
	query, err := url.ParseQuery(rawQuery)
	if err != nil {
		return p, problemf(http.StatusBadRequest, "the query string is malformed")
	}
	for _, name := range slices.Sorted(maps.Keys(query)) {
		value := query.Get(name)
		ok, accepts := true, ""
		switch name {
		case "category":
			p.category, accepts = &value, "text of at most 100 characters"
			ok = utf8.ValidString(value) && !strings.Contains(value, "\x00") && utf8.RuneCountInString(value) <= 100
		case "limit":
			accepts = fmt.Sprintf("a number from 1 to %d", maxPage)
			p.limit, ok = parseID(value)
			ok = ok && p.limit <= maxPage
		case "after":
			accepts = "an id"
			p.after, ok = parseID(value)
		default:
			return p, problemf(http.StatusBadRequest, "%s is not a parameter: use category, limit or after", name)
		}
		if len(query[name]) > 1 {
			return p, problemf(http.StatusBadRequest, "%s appears more than once", name)
		}
		if !ok {
			return p, problemf(http.StatusBadRequest, "%s must be %s", name, accepts)
		}
	}
	return p, nil
}

// next returns the path of the page that begins after an id.
func (p *page) next(after int64) string {
	query := url.Values{}
	query.Set("limit", strconv.FormatInt(min(p.limit, maxPage), 10))
	query.Set("after", strconv.FormatInt(after, 10))
	if p.category != nil {
		query.Set("category", *p.category)
	}
	return "/products?" + query.Encode()
}

// ---------------------------------------------------------------- one product

const selectProduct = `
SELECT ` + columns + `
FROM products
WHERE id = $1`

// getProduct answers GET /products/{id}, from the cache.
func (s *server) getProduct(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	return s.respondCached(w, r, productKey(id), func(ctx context.Context) ([]byte, error) {
		var p product
		if err := p.scan(s.db.QueryRowContext(ctx, selectProduct, id)); err != nil {
			return nil, err
		}
		return encode(&p)
	})
}

// In insertProduct and updateProduct, NULL stands for a field that was not sent. The casts turn a number's digits into
// an exact number.
const insertProduct = `
INSERT INTO products (name, description, price, stock, category)
VALUES ($1, coalesce($2, ''), $3::numeric, coalesce($4::integer, 0), coalesce($5, ''))
RETURNING ` + columns

// skipTakenIDs moves the id sequence past the ids that other sessions inserted. It ignores ids from 1 << 62 on: past
// them, the sequence would soon be exhausted.
const skipTakenIDs = `
SELECT setval(sequence, taken)
FROM (SELECT pg_get_serial_sequence('products', 'id')::regclass AS sequence) AS s,
     LATERAL (SELECT nextval(sequence) AS next,
                     (SELECT max(id) FROM products WHERE id < 1::bigint << 62) AS taken) AS ids
WHERE taken >= next`

// createProduct answers POST /products. The new product cannot be cached yet, but the list can.
func (s *server) createProduct(w http.ResponseWriter, r *http.Request) error {
	f, err := s.readFields(r, true)
	if err != nil {
		return err
	}
	var p product
	create := func(ctx context.Context, conn *sql.Conn) error {
		return p.scan(conn.QueryRowContext(ctx, insertProduct, f.Name, f.Description, f.Price, f.Stock, f.Category))
	}
	// An imported row may already have the next id of the sequence. Nothing was created then. Other sessions may move
	// the sequence at the same time, so one retry may not be enough.
	for range 20 {
		err = s.cache.Write(r.Context(), []string{keyAll}, create)
		if e := pq.As(err, pqerror.UniqueViolation); e == nil || e.Constraint != "products_pkey" {
			break
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), poolTimeout)
		_, failed := s.db.ExecContext(ctx, skipTakenIDs)
		cancel()
		if failed != nil {
			return failed
		}
	}
	if err != nil {
		return err
	}
	w.Header().Set("Location", "/products/"+strconv.FormatInt(p.ID, 10))
	return respondJSON(w, http.StatusCreated, &p)
}

const updateProduct = `
UPDATE products
SET name        = coalesce($2, name),
    description = coalesce($3, description),
    price       = coalesce($4::numeric, price),
    stock       = coalesce($5::integer, stock),
    category    = coalesce($6, category),
    updated_at  = clock_timestamp() -- now() is when the transaction began, maybe long before it got the row's lock
WHERE id = $1
RETURNING ` + columns

// updateProduct answers PUT /products/{id}. It sends one statement: reading the row and writing it back would lose what
// another client changed in between.
func (s *server) updateProduct(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	f, err := s.readFields(r, false)
	if err != nil {
		return err
	}
	var p product
	update := func(ctx context.Context, conn *sql.Conn) error {
		return p.scan(conn.QueryRowContext(ctx, updateProduct, id, f.Name, f.Description, f.Price, f.Stock, f.Category))
	}
	if err := s.cache.Write(r.Context(), []string{keyAll, productKey(id)}, update); err != nil {
		return err
	}
	return respondJSON(w, http.StatusOK, &p)
}

const deleteProduct = `
DELETE FROM products
WHERE id = $1
RETURNING ` + columns

// deleteProduct answers DELETE /products/{id}.
func (s *server) deleteProduct(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	remove := func(ctx context.Context, conn *sql.Conn) error {
		return new(product).scan(conn.QueryRowContext(ctx, deleteProduct, id))
	}
	if err := s.cache.Write(r.Context(), []string{keyAll, productKey(id)}, remove); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// clearCache answers DELETE /cache/clear. It deletes only this service's keys: other programs may use the same Redis.
func (s *server) clearCache(w http.ResponseWriter, r *http.Request) error {
	cleared, err := s.cache.Clear()
	if err != nil {
		slog.Warn("cache not cleared", "error", err)
		return problemf(http.StatusServiceUnavailable, "cache unavailable")
	}
	return respondJSON(w, http.StatusOK, map[string]int{"cleared": cleared})
}

// productKey returns the cache key of a product.
func productKey(id int64) string { return keyPrefix + strconv.FormatInt(id, 10) }

// parseID parses a positive 64-bit integer. It accepts only the form in which the API writes it: no sign and no leading
// zero.
func parseID(text string) (int64, bool) {
	id, err := strconv.ParseInt(text, 10, 64)
	return id, err == nil && id > 0 && strconv.FormatInt(id, 10) == text
}

// pathID returns the id in a request's path. If it is not an id, the error is errNotFound: no product can have it.
func pathID(r *http.Request) (int64, error) {
	id, ok := parseID(r.PathValue("id"))
	if !ok {
		return 0, errNotFound
	}
	return id, nil
}

// ---------------------------------------------------------------- bodies

// fields holds what a body may contain. The service ignores the last three, so that a client can edit what it read and
// send it back.
type fields struct {
	Name        text   `json:"name"`
	Description text   `json:"description"`
	Price       digits `json:"price"`
	Stock       digits `json:"stock"`
	Category    text   `json:"category"`

	ID        json.RawMessage `json:"id"`
	CreatedAt json.RawMessage `json:"created_at"`
	UpdatedAt json.RawMessage `json:"updated_at"`
}

// A text is a string field of a body. If it was not sent, it is NULL in a statement.
type text struct{ sql.NullString }

// UnmarshalJSON accepts only a string without NUL, which PostgreSQL cannot store. encoding/json adds the name of the
// field to an UnmarshalTypeError.
func (t *text) UnmarshalJSON(value []byte) error {
	if err := json.Unmarshal(value, &t.String); err != nil {
		return err
	}
	if value[0] == 'n' {
		return &json.UnmarshalTypeError{Value: "null", Type: reflect.TypeFor[string]()}
	}
	if strings.Contains(t.String, "\x00") {
		return &json.UnmarshalTypeError{Value: "string with a NUL", Type: reflect.TypeFor[string]()}
	}
	t.Valid = true
	return nil
}

// A digits is a number field of a body, as its digits, so that a price stays exact from the body to PostgreSQL. If it
// was not sent, it is NULL in a statement.
type digits struct{ sql.NullString }

// UnmarshalJSON accepts only a number.
func (d *digits) UnmarshalJSON(value []byte) error {
	if value[0] == 'n' {
		return &json.UnmarshalTypeError{Value: "null", Type: reflect.TypeFor[float64]()}
	}
	if value[0] != '-' && (value[0] < '0' || value[0] > '9') {
		return json.Unmarshal(value, new(float64)) // fails, and its error names the wrong type
	}
	d.Valid, d.String = true, string(value)
	return nil
}

// maxBody is the largest request body in bytes.
const maxBody = 1 << 20

// readFields reads, decodes and checks a request's body, which must be JSON. The error is a problem, or the context's.
func (s *server) readFields(r *http.Request, creating bool) (fields, error) {
	if encoding := r.Header.Get("Content-Encoding"); encoding != "" && encoding != "identity" {
		return fields{}, problemf(http.StatusUnsupportedMediaType, "send the body uncompressed, without Content-Encoding")
	}
	mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || mediaType != "application/json" {
		return fields{}, problemf(http.StatusUnsupportedMediaType, "send Content-Type: application/json")
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, largeRequest))
	if err == nil && len(body) == largeRequest {
		if err := takeSlot(r.Context(), s.largeRequests); err != nil {
			return fields{}, err
		}
		defer func() { <-s.largeRequests }()
		body, err = io.ReadAll(io.MultiReader(bytes.NewReader(body), r.Body))
	}
	if _, large := errors.AsType[*http.MaxBytesError](err); large {
		return fields{}, problemf(http.StatusRequestEntityTooLarge, "the body is larger than 1 MiB")
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return fields{}, problemf(http.StatusRequestTimeout, "the body took too long to arrive")
	}
	if err != nil {
		return fields{}, problemf(http.StatusBadRequest, "the body could not be read")
	}
	f, err := decodeFields(body)
	if err == nil {
		err = f.check(creating)
	}
	return f, err
}

// decodeFields decodes a body, which must be one JSON object with known fields of the right types. The error is a
// problem.
func decodeFields(body []byte) (f fields, err error) {
	if !utf8.Valid(body) {
		return f, problemf(http.StatusBadRequest, "the body is not valid UTF-8")
	}
	if !bytes.HasPrefix(bytes.TrimLeft(body, " \t\r\n"), []byte("{")) || !json.Valid(body) {
		return f, problemf(http.StatusBadRequest, "the body must be one JSON object")
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	err = dec.Decode(&f)
	if wrong, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		wanted := "string"
		if wrong.Type.Kind() == reflect.Float64 {
			wanted = "number"
		}
		return f, problemf(http.StatusBadRequest, "%s must be a %s, got %s", wrong.Field, wanted, wrong.Value)
	}
	if err != nil { // an unknown field: the only other error, for which encoding/json has no type
		return f, problemf(http.StatusBadRequest, "%s is not a field", strings.TrimPrefix(err.Error(), "json: unknown field "))
	}
	return f, nil
}

var isPrice = regexp.MustCompile(`^[0-9]{1,8}(\.[0-9]{1,2})?$`).MatchString

// isStock reports whether digits are a whole number that PostgreSQL's type integer can hold.
func isStock(digits string) bool {
	_, err := strconv.ParseUint(digits, 10, 31)
	return err == nil
}

// hasLength reports whether a text has from min to max characters.
func hasLength(text string, min, max int) bool {
	n := utf8.RuneCountInString(text)
	return n >= min && n <= max
}

// check trims the name and checks every field. The error is a problem that names every field at fault.
func (f *fields) check(creating bool) error {
	f.Name.String = strings.TrimSpace(f.Name.String)
	faults, sent := map[string]string{}, false
	rule := func(name string, field sql.NullString, required, valid bool, message string) {
		sent = sent || field.Valid
		if field.Valid && !valid {
			faults[name] = message
		} else if !field.Valid && required && creating {
			faults[name] = "is required"
		}
	}
	rule("name", f.Name.NullString, true, hasLength(f.Name.String, 1, 200), "must have from 1 to 200 characters")
	rule("description", f.Description.NullString, false, hasLength(f.Description.String, 0, 2000),
		"must have at most 2000 characters")
	rule("category", f.Category.NullString, false, hasLength(f.Category.String, 0, 100),
		"must have at most 100 characters")
	rule("price", f.Price.NullString, true, isPrice(f.Price.String),
		"must be a number from 0 to 99999999.99 with at most 2 decimals")
	rule("stock", f.Stock.NullString, false, isStock(f.Stock.String), "must be a whole number from 0 to 2147483647")
	if len(faults) > 0 {
		return &problem{Status: http.StatusUnprocessableEntity, Detail: "some fields are not valid", Errors: faults}
	}
	if !sent {
		return problemf(http.StatusUnprocessableEntity, "no field was sent: nothing to change")
	}
	return nil
}

# Two stages: the first compiles with the Go toolchain, the second holds only the result. The final
# image has no shell, no package manager and no C library: nothing to patch, little to attack.
FROM golang:1.26-alpine AS build
WORKDIR /src

# The modules are a separate layer. Docker downloads them again only if go.mod or go.sum changes.
COPY go.mod go.sum ./
RUN go mod download

# Without cgo the binary is static, so it runs in an empty image. The flags leave out what it does not
# need: build paths, debug tables (-s -w) and HTTP/2, which Go speaks only over TLS. "ping" is a link
# to the binary, which acts as a small ping under that name. So `docker exec desafio3-web ping -c 3
# postgres` works.
COPY *.go schema.sql ./
ENV CGO_ENABLED=0 GOFLAGS="-trimpath -tags=nethttpomithttp2"
RUN go build -o /dev/null .
# The version changes with every commit. Set only here, it costs a new link but no new compilation.
ARG VERSION=
RUN go build -ldflags="-s -w -X main.release=$VERSION" -o /out/web . && ln -s web /out/ping

FROM scratch
# Copying the folder keeps the link a link, so the image has only one copy of the binary.
COPY --from=build /out/ /bin/
# A number, because a scratch image has no /etc/passwd for a name. No other user has this one.
USER 65532:65532
EXPOSE 8000
ENTRYPOINT ["/bin/web"]

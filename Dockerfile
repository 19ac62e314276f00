# Two stages: the first compiles with the Go toolchain, the second holds the result alone. The image
# that runs has no shell, no package manager and no C library: nothing to patch, little to attack.
FROM golang:1.26-alpine AS build
WORKDIR /src

# The modules have a layer of their own: as long as go.mod and go.sum stay the same, changing the
# code does not download them again.
COPY go.mod go.sum ./
RUN go mod download

# Without cgo the binary is static, so it runs on an empty image. The flags leave out what it does not
# need there: the build's paths, the debugger's tables (-s -w) and HTTP/2, which Go speaks only over
# TLS. "ping" is a link to it: called by that name it is a small ping, so that
# `docker exec desafio3-web ping -c 3 postgres` works.
COPY *.go schema.sql ./
ENV CGO_ENABLED=0 GOFLAGS="-trimpath -tags=nethttpomithttp2"
RUN go build -o /dev/null .
# The version changes with every commit. Given only here, it costs a new link of what is compiled above.
ARG VERSION=
RUN go build -ldflags="-s -w -X main.release=$VERSION" -o /out/web . && ln -s web /out/ping

FROM scratch
# A folder is copied as it is, so the link stays a link and the binary is in the image once.
COPY --from=build /out/ /bin/
# A number, because a scratch image has no /etc/passwd to look a name up in. It is nobody's number.
USER 65532:65532
EXPOSE 8000
ENTRYPOINT ["/bin/web"]

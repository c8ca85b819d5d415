// Command gateway speaks the MongoDB wire protocol on one address and keeps the
// data in a PostgreSQL that has the DocumentDB extension.
//
// It reads the PostgreSQL URL from the environment variable GATEWAY_POSTGRESQL_URL,
// so that its password does not show in the list of processes.
package main

import (
	"context"
	"flag"
	"log"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/FerretDB/FerretDB/v2/ferretdb"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:27017", "address to listen on, host:port")
	state := flag.String("state", ".", "directory for the gateway's own state")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()

	telemetry := false

	f, err := ferretdb.New(&ferretdb.Config{
		PostgreSQLURL: os.Getenv("GATEWAY_POSTGRESQL_URL"),
		ListenAddr:    *listen,
		StateDir:      *state,
		LogLevel:      slog.LevelWarn,
		LogOutput:     os.Stderr,
		Telemetry:     &telemetry,
	})
	if err != nil {
		log.Fatal(err)
	}

	f.Run(ctx)
}

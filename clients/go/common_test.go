package tokenwire_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	tokenwire "github.com/tokenwire/tokenwire/clients/go"
	"github.com/tokenwire/tokenwire/clients/go/tokenwiretest"
)

var (
	ctx = context.Background()
	hi  = tokenwire.Request{Model: "m", Prompt: "Hi"}
)

// TestMain also sees to it that no call leaves a goroutine of gRPC behind.
func TestMain(m *testing.M) {
	code := m.Run()
	stacks := make([]byte, 1<<20)
	for range 100 {
		stacks = stacks[:runtime.Stack(stacks[:cap(stacks)], true)]
		if !strings.Contains(string(stacks), "google.golang.org/grpc/internal/transport") {
			os.Exit(code)
		}
		time.Sleep(50 * time.Millisecond)
	}
	fmt.Fprintf(os.Stderr, "goroutines are left:\n%s\n", stacks)
	os.Exit(1)
}

// started returns a gateway and a client of it.
func started(t *testing.T, options ...tokenwire.Option) (*tokenwiretest.Gateway, *tokenwire.Client) {
	t.Helper()
	t.Parallel()
	gateway := tokenwiretest.NewGateway(t)
	return gateway, gateway.Client(t, options...)
}

// failure returns the *Error that err must be.
func failure(t *testing.T, err error) *tokenwire.Error {
	t.Helper()
	var failed *tokenwire.Error
	if !errors.As(err, &failed) {
		t.Fatalf("got %T %v, expected a *tokenwire.Error", err, err)
	}
	return failed
}

func equal[T comparable](t *testing.T, what string, got, expected T) {
	t.Helper()
	if got != expected {
		t.Errorf("%s: got %#v, expected %#v", what, got, expected)
	}
}

func must[T any](t *testing.T) func(T, error) T {
	return func(value T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
}

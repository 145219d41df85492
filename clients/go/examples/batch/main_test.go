package main

import (
	"context"
	"strings"
	"testing"

	tokenwire "github.com/tokenwire/tokenwire/clients/go"
	"github.com/tokenwire/tokenwire/clients/go/tokenwiretest"
)

func TestAsk(t *testing.T) {
	gateway := tokenwiretest.NewGateway(t)
	gateway.Reply(tokenwiretest.Text("one"))
	gateway.Fail(tokenwiretest.Failure{Reason: tokenwire.ReasonContentFiltered, Message: "no"})
	gateway.Reply(tokenwiretest.Text("three"))
	var out, errs strings.Builder
	failed, err := ask(context.Background(), gateway.Client(t), "m", strings.NewReader("1\n\n2\n3\n"), &out, &errs)
	if failed != 1 || err != nil || out.String() != "2\t\"three\"\n0\t\"one\"\n" {
		t.Errorf("got %d, %v, %q", failed, err, out.String())
	}
	if !strings.HasPrefix(errs.String(), "1\tCONTENT_FILTERED: no (request ") {
		t.Errorf("errors: %q", errs.String())
	}
}

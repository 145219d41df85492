package tokenwiretest_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	tokenwire "github.com/tokenwire/tokenwire/clients/go"
	pb "github.com/tokenwire/tokenwire/clients/go/tokenwire/v1"
	"github.com/tokenwire/tokenwire/clients/go/tokenwiretest"
)

// The fake gateway keeps the promises that its users' tests rest on.

var (
	ctx = context.Background()
	hi  = tokenwire.Request{Model: "m", Prompt: "Hi"}
)

func TestEveryReasonReachesTheClient(t *testing.T) {
	gateway := tokenwiretest.NewGateway(t)
	client := gateway.Client(t)
	for number, name := range pb.ErrorReason_name {
		reason := tokenwire.Reason(strings.TrimPrefix(name, "ERROR_REASON_"))
		code, known := tokenwiretest.Code(reason)
		if known != (number != 0) {
			t.Errorf("%s has no code", reason)
		}
		if !known {
			continue
		}
		before := len(gateway.Calls())
		gateway.Fail(tokenwiretest.Failure{Reason: reason, Pushback: tokenwire.Ptr(-time.Second)})
		_, err := client.Chat(ctx, hi)
		var failed *tokenwire.Error
		if !errors.As(err, &failed) || failed.Reason != reason || failed.Code != code {
			t.Errorf("%s: got %v", reason, err)
		}
		if calls := len(gateway.Calls()) - before; calls != 1 {
			t.Errorf("%s: %d calls", reason, calls)
		}
	}
}

func TestACallWithoutAScriptFailsLoudly(t *testing.T) {
	client := tokenwiretest.NewGateway(t).Client(t)
	for _, ask := range []func() error{
		func() error { _, err := client.Chat(ctx, hi); return err },
		func() error { _, err := client.Stream(ctx, hi).Reply(); return err },
		func() error {
			results, err := client.BatchOrdered(ctx, []tokenwire.Request{hi})
			if err != nil {
				return err
			}
			return results[0].Err
		},
	} {
		if err := ask(); !errors.Is(err, tokenwire.ReasonInternal) || !strings.Contains(err.Error(), "no answer left") {
			t.Errorf("got %v", err)
		}
	}
}

func TestATokenCanBeDemanded(t *testing.T) {
	gateway := tokenwiretest.NewGateway(t, tokenwiretest.WithToken("right"))
	gateway.Reply(tokenwiretest.Text("ok"))
	wrong := gateway.Client(t, tokenwire.WithToken("wrong"))
	_, chat := wrong.Chat(ctx, hi)
	_, stream := wrong.Stream(ctx, hi).Reply()
	_, batch := wrong.BatchOrdered(ctx, []tokenwire.Request{hi})
	_, count := wrong.CountTokens(ctx, "m", "a")
	_, tokens := wrong.Tokenize(ctx, "m", nil)
	_, models := wrong.Models(ctx)
	_, model := wrong.Model(ctx, "gpt-4o-mini")
	for i, err := range []error{chat, stream, batch, count, tokens, models, model} {
		if !errors.Is(err, tokenwire.ReasonCallerUnauthenticated) {
			t.Errorf("%d: got %v", i, err)
		}
	}
	if reply, err := gateway.Client(t).Chat(ctx, hi); err != nil || reply.Text() != "ok" {
		t.Errorf("got %v, %v", reply, err)
	}
}

func TestMistakesInAScriptAreToldAtOnce(t *testing.T) {
	gateway := tokenwiretest.NewGateway(t)
	for name, script := range map[string]func(){
		"finish reason":  func() { gateway.ReplyWith(tokenwiretest.Answer{FinishReason: "eos"}) },
		"no such reason": func() { gateway.Fail(tokenwiretest.Failure{Reason: "TYPO"}) },
		"arguments":      func() { tokenwiretest.ToolCall("f", func() {}) },
	} {
		func() {
			defer func() {
				if text, _ := recover().(string); !strings.Contains(text, name) {
					t.Errorf("%s: got %q", name, text)
				}
			}()
			script()
		}()
	}
}

func TestScriptedEventsAreNotRepeated(t *testing.T) {
	gateway := tokenwiretest.NewGateway(t)
	gateway.Reply(tokenwiretest.Text("x"), tokenwiretest.Part{{
		Event: &pb.StreamChatResponse_Finish{Finish: &pb.Finish{FinishReasonRaw: "mine"}},
	}})
	var kinds []string
	for event, err := range gateway.Client(t).Stream(ctx, hi).All() {
		if err != nil {
			t.Fatal(err)
		}
		kinds = append(kinds, string(event.Kind))
	}
	if got := strings.Join(kinds, " "); got != "header delta finish trailer" {
		t.Errorf("got %s", got)
	}
}

func TestAnAnsweredCallWasNotCancelled(t *testing.T) {
	gateway := tokenwiretest.NewGateway(t)
	gateway.Reply(tokenwiretest.Text("x")).Reply(tokenwiretest.Text("x")).Hang()
	client := gateway.Client(t)
	if _, err := client.Chat(ctx, hi); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Stream(ctx, hi).Reply(); err != nil {
		t.Fatal(err)
	}
	for _, call := range gateway.Calls() {
		if call.WaitCancelled(10 * time.Second) {
			t.Errorf("%s was answered", call.Method)
		}
	}
	go client.Chat(ctx, hi)
	for len(gateway.Calls()) < 3 {
		time.Sleep(time.Millisecond)
	}
	if gateway.Calls()[2].WaitCancelled(10 * time.Millisecond) {
		t.Error("still hangs")
	}
}

func TestCutIsNoOKForAUnaryCall(t *testing.T) {
	gateway := tokenwiretest.NewGateway(t)
	gateway.Cut(tokenwiretest.Text("x"))
	if _, err := gateway.Client(t).Chat(ctx, hi); !errors.Is(err, tokenwire.ReasonUpstreamStreamInterrupted) {
		t.Errorf("got %v", err)
	}
}

func TestClosingEndsHangingCalls(t *testing.T) {
	gateway, err := tokenwiretest.Start()
	if err != nil {
		t.Fatal(err)
	}
	gateway.Hang(tokenwiretest.Text("x"))
	for event, err := range gateway.Client(t).Stream(ctx, hi).All() {
		if event.Text != "" {
			gateway.Close()
		}
		var failed *tokenwire.Error
		if err != nil && (!errors.As(err, &failed) || failed.Code != codes.Unavailable || failed.PartialText() != "x") {
			t.Errorf("got %v", err)
		}
	}
}

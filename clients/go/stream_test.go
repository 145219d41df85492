package tokenwire_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	tokenwire "github.com/tokenwire/tokenwire/clients/go"
	pb "github.com/tokenwire/tokenwire/clients/go/tokenwire/v1"
	"github.com/tokenwire/tokenwire/clients/go/tokenwiretest"
)

// read returns the kinds and the text of a stream's events, and its error.
func read(stream *tokenwire.Stream) (kinds, text string, failed error) {
	for event, err := range stream.All() {
		if err != nil {
			failed = err
			continue // an error is the last thing: otherwise this would not end
		}
		kinds += string(event.Kind) + " "
		text += event.Text
	}
	return strings.TrimSpace(kinds), text, failed
}

func TestStream(t *testing.T) {
	gateway, client := started(t)
	gateway.Reply(tokenwiretest.Reasoning("Hm", "m."), tokenwiretest.Text("Hel"), tokenwiretest.Heartbeat(), tokenwiretest.Text("lo"))
	stream := client.Stream(ctx, hi, tokenwire.MaxDelay(250*time.Millisecond))
	equal(t, "calls before it is read", len(gateway.Calls()), 0)
	_, known := stream.TimeToFirstToken()
	equal(t, "time to first token before it", known, false)

	kinds, text, err := read(stream)

	if err != nil {
		t.Fatal(err)
	}
	equal(t, "kinds", kinds, "header delta delta delta delta finish trailer")
	equal(t, "text", text, "Hello")
	reply := must[*tokenwire.Reply](t)(stream.Reply())
	equal(t, "reply", reply.Text()+"|"+reply.Reasoning()+"|"+string(reply.FinishReason()), "Hello|Hmm.|stop")
	equal(t, "usage", reply.Usage.CompletionTokens, 2)
	equal(t, "id", reply.RequestID, gateway.Calls()[0].Metadata.Get("x-request-id")[0])
	if ttft, ok := stream.TimeToFirstToken(); !ok || ttft <= 0 {
		t.Errorf("time to first token: %v %v", ttft, ok)
	}
	sent := gateway.Calls()[0].Request.(*pb.StreamChatRequest)
	equal(t, "max delay", sent.GetMaxDelay().AsDuration(), 250*time.Millisecond)
	equal(t, "mode", sent.GetMode(), pb.StreamMode_STREAM_MODE_DELTA)
	kinds, _, err = read(stream)
	equal(t, "read again", kinds, "")
	equal(t, "read again", err, nil)
}

func TestAStreamGivesWhatChatGives(t *testing.T) {
	gateway, client := started(t)
	parts := []tokenwiretest.Part{
		tokenwiretest.Reasoning("r"), tokenwiretest.Text("a"), tokenwiretest.ToolCall("f", `{"x": 1}`),
		tokenwiretest.Text("b"), tokenwiretest.Delta(&pb.Delta{ChoiceIndex: 1, Content: "c"}),
	}
	for range 3 {
		gateway.Reply(parts...)
	}
	whole := must[*tokenwire.Reply](t)(client.Chat(ctx, hi))
	for _, options := range [][]tokenwire.StreamOption{nil, {tokenwire.Cumulative()}} {
		streamed := must[*tokenwire.Reply](t)(client.Stream(ctx, hi, options...).Reply())
		if !proto.Equal(streamed.Proto(), whole.Proto()) {
			t.Errorf("got %v, expected %v", streamed.Proto(), whole.Proto())
		}
	}
}

func TestCumulativeModeReadsTheSame(t *testing.T) {
	gateway, client := started(t)
	gateway.Reply(tokenwiretest.Text("Hel", "lo ", "world"))
	stream := client.Stream(ctx, hi, tokenwire.Cumulative())
	kinds, text, err := read(stream)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "kinds", kinds, "header snapshot snapshot snapshot finish trailer")
	equal(t, "text", text+"|"+stream.SoFar().Text(), "Hello world|Hello world")
}

func TestOnlyTheText(t *testing.T) {
	gateway, client := started(t)
	gateway.Fail(tokenwiretest.Failure{
		Reason: tokenwire.ReasonUpstreamStreamInterrupted,
		After: []tokenwiretest.Part{
			tokenwiretest.Text("a"), tokenwiretest.Delta(&pb.Delta{ChoiceIndex: 1, Content: "x"}),
			tokenwiretest.Reasoning("no"), tokenwiretest.Text("", "b"),
		},
	})
	var got []string
	for text, err := range client.Stream(ctx, hi).Text() {
		if err != nil {
			text = string(failure(t, err).Reason)
		}
		got = append(got, text)
	}
	equal(t, "texts", strings.Join(got, "|"), "a|b|UPSTREAM_STREAM_INTERRUPTED")
}

func TestManyDeltasBeforeAnErrorAllArrive(t *testing.T) {
	gateway, client := started(t)
	var deltas []string
	for i := range 2000 {
		deltas = append(deltas, fmt.Sprint(i, " "))
	}
	gateway.Fail(tokenwiretest.Failure{
		Reason: tokenwire.ReasonUpstreamStreamInterrupted, After: []tokenwiretest.Part{tokenwiretest.Text(deltas...)},
	})
	stream := client.Stream(ctx, hi)
	_, text, err := read(stream)
	equal(t, "reason", failure(t, err).Reason, tokenwire.ReasonUpstreamStreamInterrupted)
	equal(t, "partial text", failure(t, err).PartialText(), strings.Join(deltas, ""))
	equal(t, "text", text, strings.Join(deltas, ""))
	equal(t, "complete", stream.IsComplete(), false)
}

func TestAFailedStreamHasNoReply(t *testing.T) {
	gateway, client := started(t)
	gateway.Fail(tokenwiretest.Failure{
		Reason: tokenwire.ReasonRateLimited, After: []tokenwiretest.Part{tokenwiretest.Text("Hel")},
		RetryAfter: 2500 * time.Millisecond, Metadata: map[string]string{"attempts": "3"},
	})
	stream := client.Stream(ctx, hi, tokenwire.WithRequestID("r-2"))
	kinds, _, err := read(stream)
	equal(t, "kinds", kinds, "header delta")
	failed := failure(t, err)
	after, ok := failed.RetryAfter()
	equal(t, "retry after", after, 2500*time.Millisecond)
	equal(t, "retry after", ok, true)
	equal(t, "attempts", failed.Attempts, 3)
	equal(t, "request id", failed.RequestID, "r-2")
	equal(t, "partial", failed.Partial.Text()+" "+failed.Partial.Header.Model, "Hel m")
	for range 2 {
		_, err = stream.Reply()
		equal(t, "reply", failure(t, err), failed)
	}
}

func TestOKWithoutATrailerIsAnError(t *testing.T) {
	gateway, client := started(t)
	for _, texts := range [][]string{nil, {"Hel", "lo"}} {
		gateway.Cut(tokenwiretest.Text(texts...))
		stream := client.Stream(ctx, hi)
		_, _, err := read(stream)
		failed := failure(t, err)
		equal(t, "code", failed.Code, codes.Internal)
		equal(t, "reason", failed.Reason, tokenwire.ReasonStreamIncomplete)
		equal(t, "partial", failed.PartialText(), strings.Join(texts, ""))
		equal(t, "retryable", failed.IsRetryable(), false)
		_, err = stream.Reply()
		equal(t, "reply", failure(t, err).Reason, tokenwire.ReasonStreamIncomplete)
	}
}

func TestAStreamOfARequestThatMakesNoSense(t *testing.T) {
	gateway, client := started(t)
	stream := client.Stream(ctx, tokenwire.Request{Prompt: "Hi"})
	kinds, _, err := read(stream)
	equal(t, "kinds", kinds, "")
	equal(t, "error", failure(t, err).Message, `model: expected the name of a model, for example "gpt-4o-mini"`)
	equal(t, "so far", stream.SoFar().Text(), "")
	equal(t, "calls", len(gateway.Calls()), 0)
}

// --- leaving ------------------------------------------------------------------------

// Every way to leave a stream ends the call at the gateway, and so the upstream's bill.
func TestLeaving(t *testing.T) {
	cancelled := func(t *testing.T, stream *tokenwire.Stream, err error) {
		t.Helper()
		equal(t, "code", failure(t, err).Code, codes.Canceled)
		equal(t, "errors.Is", errors.Is(err, context.Canceled), true)
		equal(t, "partial", failure(t, err).PartialText(), "Hel")
		equal(t, "so far", stream.SoFar().Text(), "Hel")
	}
	for name, leave := range map[string]func(*testing.T, *tokenwire.Client, context.Context, context.CancelFunc){
		"break": func(t *testing.T, client *tokenwire.Client, ctx context.Context, _ context.CancelFunc) {
			stream := client.Stream(ctx, hi)
			for event := range stream.All() {
				if event.Text != "" {
					break
				}
			}
			equal(t, "so far", stream.SoFar().Text(), "Hel")
			_, err := stream.Reply()
			cancelled(t, stream, err)
			_, _, err = read(stream)
			cancelled(t, stream, err)
		},
		"break from the text": func(_ *testing.T, client *tokenwire.Client, ctx context.Context, _ context.CancelFunc) {
			for range client.Stream(ctx, hi).Text() {
				break
			}
		},
		"return": func(_ *testing.T, client *tokenwire.Client, ctx context.Context, _ context.CancelFunc) {
			for range client.Stream(ctx, hi).All() {
				return
			}
		},
		"panic": func(t *testing.T, client *tokenwire.Client, ctx context.Context, _ context.CancelFunc) {
			defer func() { equal(t, "panic", recover(), any("mine")) }()
			for event := range client.Stream(ctx, hi).All() {
				if event.Text != "" {
					panic("mine")
				}
			}
		},
		"close from another goroutine": func(t *testing.T, client *tokenwire.Client, ctx context.Context, _ context.CancelFunc) {
			stream := client.Stream(ctx, hi)
			var failed error
			for event, err := range stream.All() {
				if event.Text != "" {
					time.AfterFunc(50*time.Millisecond, func() { stream.Close(); stream.Close() })
				}
				failed = err // never a quiet end of the loop
			}
			cancelled(t, stream, failed)
		},
		"the end of the context": func(t *testing.T, client *tokenwire.Client, ctx context.Context, cancel context.CancelFunc) {
			stream := client.Stream(ctx, hi)
			var failed error
			for event, err := range stream.All() {
				if event.Text != "" {
					cancel()
				}
				failed = err
			}
			cancelled(t, stream, failed)
		},
		"closing the client": func(t *testing.T, client *tokenwire.Client, ctx context.Context, _ context.CancelFunc) {
			stream := client.Stream(ctx, hi)
			var failed error
			for event, err := range stream.All() {
				if event.Text != "" {
					client.Close()
				}
				failed = err
			}
			cancelled(t, stream, failed)
		},
	} {
		t.Run(name, func(t *testing.T) {
			gateway, client := started(t)
			gateway.Hang(tokenwiretest.Text("Hel"))
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			leave(t, client, ctx, cancel)
			equal(t, "cancelled", gateway.Calls()[0].WaitCancelled(10*time.Second), true)
		})
	}
}

func TestAStreamClosedBeforeItIsReadIsNeverSent(t *testing.T) {
	gateway, client := started(t)
	stream := client.Stream(ctx, hi)
	stream.Close()
	_, _, err := read(stream)
	equal(t, "code", failure(t, err).Code, codes.Canceled)
	equal(t, "calls", len(gateway.Calls()), 0)
}

func TestLeavingAtTheLastEventKeepsTheReply(t *testing.T) {
	gateway, client := started(t)
	gateway.Reply(tokenwiretest.Text("ok"))
	stream := client.Stream(ctx, hi)
	for event := range stream.All() {
		if event.Kind == tokenwire.EventTrailer {
			break
		}
	}
	equal(t, "reply", must[*tokenwire.Reply](t)(stream.Reply()).Text(), "ok")
}

func TestCancellingChat(t *testing.T) {
	gateway, client := started(t)
	gateway.Hang()
	leaving, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		for len(gateway.Calls()) == 0 {
			time.Sleep(5 * time.Millisecond)
		}
		cancel()
	}()
	_, err := client.Chat(leaving, hi)
	equal(t, "errors.Is", errors.Is(err, context.Canceled), true)
	equal(t, "cancelled", gateway.Calls()[0].WaitCancelled(10*time.Second), true)
}

func TestReadingFromTwoSides(t *testing.T) {
	gateway, client := started(t)
	gateway.Reply(tokenwiretest.Text(strings.Split(strings.Repeat("x", 500), "")...))
	stream := client.Stream(ctx, hi)
	over := make(chan struct{})
	go func() { // the race detector watches
		defer close(over)
		for !stream.IsComplete() {
			stream.SoFar().Text()
			stream.TimeToFirstToken()
		}
	}()
	equal(t, "reply", len(must[*tokenwire.Reply](t)(stream.Reply()).Text()), 500)
	<-over
}

// --- batches ------------------------------------------------------------------------

var three = []tokenwire.Request{
	{Model: "m", Prompt: "1", CustomID: "a"}, {Model: "m", Prompt: "2"}, {Model: "m", Prompt: "3", CustomID: "c"},
}

func TestBatch(t *testing.T) {
	gateway, client := started(t)
	script := func() {
		gateway.Reply(tokenwiretest.Text("one"))
		gateway.Fail(tokenwiretest.Failure{Reason: tokenwire.ReasonContentFiltered})
		gateway.Reply(tokenwiretest.Text("three"))
	}
	told := func(result tokenwire.BatchResult) string {
		if result.Err != nil {
			return fmt.Sprint(result.Index, result.CustomID, failure(t, result.Err).Reason)
		}
		return fmt.Sprint(result.Index, result.CustomID, result.Reply.Text())
	}
	expected := []string{"0aone", "1CONTENT_FILTERED", "2cthree"}

	script()
	var got []string
	for result, err := range client.Batch(ctx, three, tokenwire.MaxConcurrency(2)) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, told(result))
	}
	equal(t, "as they come", strings.Join(got, " "), expected[2]+" "+expected[1]+" "+expected[0])
	equal(t, "concurrency", gateway.Calls()[0].Request.(*pb.BatchChatRequest).GetMaxConcurrency(), 2)

	script()
	got = nil
	for _, result := range must[[]tokenwire.BatchResult](t)(client.BatchOrdered(ctx, three)) {
		got = append(got, told(result))
	}
	equal(t, "in order", strings.Join(got, " "), strings.Join(expected, " "))
}

func TestLeavingABatch(t *testing.T) {
	gateway, client := started(t)
	gateway.Hang().Reply(tokenwiretest.Text("two"))
	for result, err := range client.Batch(ctx, three[:2]) {
		equal(t, "error", err, nil)
		equal(t, "text", result.Reply.Text(), "two")
		break
	}
	equal(t, "cancelled", gateway.Calls()[0].WaitCancelled(10*time.Second), true)
}

func TestABatchThatFailsAsAWholeKeepsWhatArrived(t *testing.T) {
	gateway, client := started(t)
	gateway.Hang().Reply(tokenwiretest.Text("two"))
	soon, cancel := context.WithTimeout(ctx, 700*time.Millisecond)
	defer cancel()
	results := must[[]tokenwire.BatchResult](t)(client.BatchOrdered(soon, three[:2]))
	equal(t, "arrived", results[1].Reply.Text(), "two")
	equal(t, "not arrived", failure(t, results[0].Err).Code, codes.DeadlineExceeded)
	equal(t, "custom id", results[0].CustomID, "a")

	gateway.Hang().Reply(tokenwiretest.Text("two"))
	leaving, leave := context.WithCancel(ctx)
	defer leave()
	go func() {
		for len(gateway.Calls()) < 2 {
			time.Sleep(5 * time.Millisecond)
		}
		time.Sleep(300 * time.Millisecond) // the second result has arrived
		leave()
	}()
	_, err := client.BatchOrdered(leaving, three[:2])
	equal(t, "who left has no results", errors.Is(err, context.Canceled), true)

	gateway.Close()
	_, err = client.BatchOrdered(ctx, three)
	equal(t, "nothing arrived", failure(t, err).Code, codes.Unavailable)
	for _, err := range client.Batch(ctx, three) {
		equal(t, "nothing arrived", failure(t, err).Code, codes.Unavailable)
	}
}

func TestABatchThatMakesNoSense(t *testing.T) {
	gateway, client := started(t)
	for expected, requests := range map[string][]tokenwire.Request{
		"items":                          nil,
		"items[1].chat.model":            {hi, {Prompt: "Hi"}},
		"items[0].custom_id":             {{Model: "m", Prompt: "Hi", CustomID: "\xff"}},
		"items[0].chat.messages[0].role": {{Model: "m", Messages: []tokenwire.Message{{Content: "Hi"}}}},
	} {
		_, err := client.BatchOrdered(ctx, requests)
		equal(t, "field", failure(t, err).FieldViolations[0].Field, expected)
	}
	equal(t, "calls", len(gateway.Calls()), 0)
}

func TestTimeToFirstTokenIsToTheFirstOutput(t *testing.T) {
	gateway, client := started(t)
	gateway.Reply(tokenwiretest.Delta(&pb.Delta{ChoiceIndex: 1}), tokenwiretest.Reasoning("hm"), tokenwiretest.Text("ok"))
	stream := client.Stream(ctx, hi)
	var known []bool
	times := map[time.Duration]bool{}
	for _, err := range stream.All() {
		ttft, ok := stream.TimeToFirstToken()
		known = append(known, ok || err != nil)
		times[ttft] = true
	}
	equal(t, "times: none yet, and one", len(times), 2)
	equal(t, "after header, empty delta, reasoning, ...", fmt.Sprint(known), "[false false true true true true true]")
}

func TestAStreamAsksWhatItWasMadeFor(t *testing.T) {
	t.Parallel()
	gateway := tokenwiretest.NewGateway(t)
	gateway.Reply(tokenwiretest.Text("ok"))
	request := hi
	request.Stop = []string{"a"}
	request.Labels = map[string]string{"team": "a"}
	request.Tools = []tokenwire.Tool{{Name: "a"}}
	request.ToolNames = []string{"a"}
	request.Temperature = tokenwire.Ptr(0.5)
	stream := gateway.Client(t).Stream(ctx, request)
	request.Stop[0], request.Labels["team"] = "b", "b" // before the first read sends it
	request.ToolNames[0], *request.Temperature = "b", 1
	must[*tokenwire.Reply](t)(stream.Reply())
	sent := gateway.Calls()[0].Chat()
	equal(t, "stop", sent.GetParams().GetStop()[0], "a")
	equal(t, "label", sent.GetLabels()["team"], "a")
	equal(t, "tool", sent.GetToolChoice().GetToolNames()[0], "a")
	equal(t, "temperature", sent.GetParams().GetTemperature(), 0.5)
}

package tokenwire_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	tokenwire "github.com/tokenwire/tokenwire/clients/go"
	pb "github.com/tokenwire/tokenwire/clients/go/tokenwire/v1"
	"github.com/tokenwire/tokenwire/clients/go/tokenwiretest"
)

func TestChat(t *testing.T) {
	gateway, client := started(t)
	gateway.ReplyWith(tokenwiretest.Answer{
		Parts: []tokenwiretest.Part{tokenwiretest.Text("Hello", " world")},
		Usage: &tokenwire.Usage{PromptTokens: 3, CompletionTokens: 2, TotalTokens: 5, CachedPromptTokens: tokenwire.Ptr(0)},
	})

	reply := must[*tokenwire.Reply](t)(client.Chat(ctx, tokenwire.Request{
		Model: "m", Prompt: "Hi", Temperature: tokenwire.Ptr(0.0),
	}, tokenwire.WithRequestID("r-1")))

	equal(t, "text", reply.Text(), "Hello world")
	equal(t, "role", reply.Message().Role, "assistant")
	equal(t, "finish reason", reply.FinishReason(), tokenwire.FinishStop)
	equal(t, "usage", reply.Usage.PromptTokens*100+reply.Usage.CompletionTokens*10+reply.Usage.TotalTokens, 325)
	equal(t, "cached", *reply.Usage.CachedPromptTokens, 0)
	if reply.Usage.ReasoningTokens != nil {
		t.Error("what was not reported is not 0")
	}
	equal(t, "header", reply.Header.Model+" "+reply.Header.Upstream, "m fake")
	equal(t, "request id", reply.RequestID, "r-1")
	call := gateway.Calls()[0]
	if call.Chat().GetParams().Temperature == nil {
		t.Error("zero is a value")
	}
	equal(t, "sent id", call.Metadata.Get("x-request-id")[0], "r-1")
	if agent := call.Metadata.Get("user-agent")[0]; !strings.HasPrefix(agent, "tokenwire-go/"+tokenwire.Version) {
		t.Errorf("user agent: %q", agent)
	}
	if _, sent := call.Metadata["authorization"]; sent {
		t.Error("no token, yet a header")
	}
}

func TestToolsThereAndBack(t *testing.T) {
	gateway, client := started(t)
	gateway.Reply(tokenwiretest.ToolCalls(
		tokenwiretest.Call{ID: "c1", Name: "weather", Arguments: map[string]string{"city": "Oslo"}},
		tokenwiretest.Call{ID: "c2", Name: "weather", Arguments: `{"city": "Rome"}`},
	)).Reply(tokenwiretest.Text("Cold and warm."))
	request := tokenwire.Request{Model: "m", Prompt: "Oslo or Rome?", Tools: []tokenwire.Tool{{Name: "weather"}}}

	asked := must[*tokenwire.Reply](t)(client.Chat(ctx, request))
	messages := []tokenwire.Message{tokenwire.User("?"), asked.Message()}
	for _, call := range asked.ToolCalls() {
		type city struct{ City string }
		arguments := must[city](t)(tokenwire.DecodeArguments[city](call))
		messages = append(messages, must[tokenwire.Message](t)(call.AnswerJSON(arguments)))
	}
	told := must[*tokenwire.Reply](t)(client.Chat(ctx, tokenwire.Request{Model: "m", Messages: messages}))

	equal(t, "finish reason", asked.FinishReason(), tokenwire.FinishToolCalls)
	equal(t, "text", asked.Text()+"|"+told.Text(), "|Cold and warm.")
	sent := gateway.Calls()[1].Chat().GetMessages()
	if !proto.Equal(sent[1], asked.Choices[0].Proto().GetMessage()) || sent[1].Content != nil {
		t.Errorf("the assistant's turn goes back as it came, its content null: %v", sent[1])
	}
	equal(t, "first", sent[2].GetRole()+" "+sent[2].GetToolCallId()+" "+sent[2].GetContent(), `tool c1 {"City":"Oslo"}`)
	equal(t, "second", sent[3].GetToolCallId()+" "+sent[3].GetContent(), `c2 {"City":"Rome"}`)
}

func TestSeveralChoices(t *testing.T) {
	gateway, client := started(t)
	gateway.Reply(
		tokenwiretest.Delta(&pb.Delta{ChoiceIndex: 1, Content: "zwei"}), tokenwiretest.Text("one", "!"),
	)
	reply := must[*tokenwire.Reply](t)(client.Chat(ctx, tokenwire.Request{Model: "m", Prompt: "Count", ChoiceCount: tokenwire.Ptr(2)}))
	equal(t, "choices", len(reply.Choices), 2)
	for i, text := range []string{"one!", "zwei"} {
		equal(t, "index", reply.Choices[i].Index, i)
		equal(t, "text", reply.Choices[i].Message.Content, text)
		equal(t, "finish reason", reply.Choices[i].FinishReason, tokenwire.FinishStop)
	}
}

func TestAnAnswerInJSON(t *testing.T) {
	type answer struct {
		OK bool
		N  int
	}
	gateway, client := started(t)
	gateway.Reply(tokenwiretest.Text(`{"ok": true}`)).ReplyWith(tokenwiretest.Answer{
		Parts: []tokenwiretest.Part{tokenwiretest.Text(`{"ok": tr`)}, FinishReason: tokenwire.FinishLength,
	}).Reply(tokenwiretest.Delta(&pb.Delta{Refusal: "I must not."}))
	gateway.Reply(tokenwiretest.Text(`{"ok": true, "n": "many"}`))
	schema := json.RawMessage(`{"type": "object", "b": 1, "a": 2}`)
	request := tokenwire.Request{Model: "m", Prompt: "?", Format: tokenwire.JSONSchema(schema)}
	ask := func() (answer, error) {
		return tokenwire.Decode[answer](must[*tokenwire.Reply](t)(client.Chat(ctx, request)))
	}

	equal(t, "decoded", must[answer](t)(ask()).OK, true)
	_, err := ask()
	if err == nil || !strings.Contains(err.Error(), `(finish reason "length")`) || !strings.Contains(err.Error(), `{\"ok\": tr`) {
		t.Errorf("cut off: got %v", err)
	}
	_, err = ask()
	if err == nil || !strings.Contains(err.Error(), "I must not.") {
		t.Errorf("refused: got %v", err)
	}
	half, err := ask()
	if err == nil || half != (answer{}) {
		t.Errorf("of another shape: got %v, %v", half, err)
	}
	sent := gateway.Calls()[0].Chat().GetResponseFormat().GetJsonSchema()
	equal(t, "schema, unchanged", sent.GetSchemaJson(), string(schema))
	equal(t, "name", sent.GetName(), "answer")
}

func TestTenMegabytesThereAndBackAndAgain(t *testing.T) {
	gateway, client := started(t)
	// gRPC retries only what it has kept, and by itself keeps 256 kB.
	gateway.Fail(tokenwiretest.Failure{Reason: tokenwire.ReasonGatewayDraining})
	gateway.Reply(tokenwiretest.Text(strings.Repeat("é", 2_500_000), strings.Repeat("é", 2_500_000)))
	reply := must[*tokenwire.Reply](t)(client.Chat(ctx, tokenwire.Request{Model: "m", Prompt: strings.Repeat("x", 10_000_000)}))
	equal(t, "answer", len(reply.Text()), 10_000_000)
	equal(t, "calls", len(gateway.Calls()), 2)
	equal(t, "prompt", len(gateway.Calls()[1].Chat().GetMessages()[0].GetContent()), 10_000_000)
}

// --- errors, deadlines, retries -----------------------------------------------------

func TestAnErrorSaysEverything(t *testing.T) {
	gateway, client := started(t)
	gateway.Fail(tokenwiretest.Failure{
		Reason:          tokenwire.ReasonUnknownRole,
		Message:         "one field is wrong",
		FieldViolations: []tokenwire.FieldViolation{{Field: "messages[0].role", Description: "got 'robot'"}},
		Metadata:        map[string]string{"requestId": "r-9", "attempts": "2"},
	})
	_, err := client.Chat(ctx, tokenwire.Request{Model: "m", Messages: []tokenwire.Message{{Role: "robot", Content: "x"}}})
	failed := failure(t, err)
	equal(t, "code", failed.Code, codes.InvalidArgument)
	equal(t, "reason", failed.Reason, tokenwire.ReasonUnknownRole)
	equal(t, "message", failed.Message, "one field is wrong")
	equal(t, "request id", failed.RequestID, "r-9")
	equal(t, "attempts", failed.Attempts, 2)
	equal(t, "field", failed.FieldViolations[0].Field, "messages[0].role")
	equal(t, "retryable", failed.IsRetryable(), false)
	equal(t, "partial", failed.Partial, nil)
	equal(t, "text", err.Error(), "UNKNOWN_ROLE: one field is wrong (2 attempts, request r-9); messages[0].role: got 'robot'")
}

func TestNothingListens(t *testing.T) {
	gateway, client := started(t)
	gateway.Close()
	_, err := client.Chat(ctx, hi)
	failed := failure(t, err)
	equal(t, "code", failed.Code, codes.Unavailable)
	equal(t, "reason", failed.Reason, "")
	equal(t, "retryable", failed.IsRetryable(), true)
}

func TestADeadlineEndsASilentCall(t *testing.T) {
	gateway, client := started(t)
	gateway.Hang().Hang(tokenwiretest.Text("Hel"))
	must[[]tokenwire.Model](t)(client.Models(ctx)) // so that the connection stands
	for _, ask := range []func(context.Context) (*tokenwire.Reply, error){
		func(ctx context.Context) (*tokenwire.Reply, error) { return client.Chat(ctx, hi) },
		func(ctx context.Context) (*tokenwire.Reply, error) { return client.Stream(ctx, hi).Reply() },
	} {
		soon, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
		_, err := ask(soon)
		cancel()
		equal(t, "code", failure(t, err).Code, codes.DeadlineExceeded)
		equal(t, "errors.Is", errors.Is(err, context.DeadlineExceeded), true)
		equal(t, "retryable", failure(t, err).IsRetryable(), false)
		if calls := gateway.Calls(); len(calls) == 3 {
			equal(t, "partial text", failure(t, err).PartialText(), "Hel")
		}
	}
	for _, call := range gateway.Calls()[1:] {
		equal(t, "cancelled", call.WaitCancelled(10*time.Second), true)
	}
}

func TestUnavailableIsTriedAgain(t *testing.T) {
	gateway, client := started(t)
	for _, ask := range []func() (*tokenwire.Reply, error){
		func() (*tokenwire.Reply, error) { return client.Chat(ctx, hi) },
		func() (*tokenwire.Reply, error) { return client.Stream(ctx, hi).Reply() },
	} {
		before := len(gateway.Calls())
		gateway.Fail(tokenwiretest.Failure{Reason: tokenwire.ReasonGatewayDraining}).Reply(tokenwiretest.Text("ok"))
		equal(t, "text", must[*tokenwire.Reply](t)(ask()).Text(), "ok")
		calls := gateway.Calls()[before:]
		equal(t, "calls", len(calls), 2)
		equal(t, "id", calls[1].Metadata.Get("x-request-id")[0], calls[0].Metadata.Get("x-request-id")[0])
		equal(t, "attempt", calls[1].Metadata.Get("grpc-previous-rpc-attempts")[0], "1")
	}
}

func TestThreeAttemptsAndNoMore(t *testing.T) {
	gateway, client := started(t)
	for range 4 {
		gateway.Fail(tokenwiretest.Failure{Reason: tokenwire.ReasonGatewayDraining, Pushback: tokenwire.Ptr(time.Millisecond)})
	}
	_, err := client.Chat(ctx, hi)
	equal(t, "reason", failure(t, err).Reason, tokenwire.ReasonGatewayDraining)
	equal(t, "calls", len(gateway.Calls()), 3)
}

func TestPushbackIsObeyed(t *testing.T) {
	gateway, client := started(t)
	gateway.Fail(tokenwiretest.Failure{Reason: tokenwire.ReasonGatewayOverloaded, Pushback: tokenwire.Ptr(700 * time.Millisecond)})
	gateway.Reply(tokenwiretest.Text("ok"))
	begun := time.Now()
	must[*tokenwire.Reply](t)(client.Chat(ctx, hi))
	if waited := time.Since(begun); waited < 700*time.Millisecond { // the backoff would be 0.24 s at most
		t.Errorf("tried again after %v", waited)
	}

	gateway.Fail(tokenwiretest.Failure{Reason: tokenwire.ReasonGatewayOverloaded, Pushback: tokenwire.Ptr(-time.Second)})
	_, err := client.Chat(ctx, hi)
	equal(t, "reason", failure(t, err).Reason, tokenwire.ReasonGatewayOverloaded)
	equal(t, "calls", len(gateway.Calls()), 3)
}

func TestWhatIsNotTriedAgain(t *testing.T) {
	gateway, client := started(t)
	for i, failing := range []tokenwiretest.Failure{
		{Reason: tokenwire.ReasonUpstreamError},
		{Reason: tokenwire.ReasonRateLimited, RetryAfter: time.Millisecond},
		{Reason: tokenwire.ReasonGatewayDraining, After: []tokenwiretest.Part{tokenwiretest.Text("x")}},
		{Code: codes.Internal},
	} {
		gateway.Fail(failing)
		_, err := client.Stream(ctx, hi).Reply()
		equal(t, "reason", failure(t, err).Reason, failing.Reason)
		equal(t, "calls", len(gateway.Calls()), i+1)
	}
}

// --- metadata -----------------------------------------------------------------------

func TestRequestIDsAreMadeUpAndDiffer(t *testing.T) {
	gateway, client := started(t)
	gateway.Reply(tokenwiretest.Text("a")).Reply(tokenwiretest.Text("b")).Fail(tokenwiretest.Failure{Reason: tokenwire.ReasonInternal})
	first := must[*tokenwire.Reply](t)(client.Chat(ctx, hi)).RequestID
	stream := client.Stream(ctx, hi)
	second := must[*tokenwire.Reply](t)(stream.Reply()).RequestID
	_, err := client.Chat(ctx, hi)
	equal(t, "stream", stream.RequestID(), second)
	for i, id := range []string{first, second, failure(t, err).RequestID} {
		equal(t, "length", len(id), 32)
		equal(t, "sent", strings.Join(gateway.Calls()[i].Metadata.Get("x-request-id"), "|"), id)
	}
	if first == second {
		t.Error("two calls have one id")
	}
}

func TestMetadata(t *testing.T) {
	gateway, client := started(t, tokenwire.WithToken("t"))
	for range 3 {
		gateway.Reply(tokenwiretest.Text("a"))
	}
	outer := metadata.AppendToOutgoingContext(ctx, "x-request-id", "outer", "x-mine", "1")
	reply := must[*tokenwire.Reply](t)(client.Chat(outer, hi,
		tokenwire.WithMetadata("traceparent", "00-1"), tokenwire.WithMetadata("X-Raw-Bin", "\x00\xff")))
	equal(t, "request id", reply.RequestID, "outer")
	reply = must[*tokenwire.Reply](t)(client.Chat(outer, hi, tokenwire.WithRequestID("inner")))
	equal(t, "request id", reply.RequestID, "inner")
	for i, expected := range []string{"outer", "inner"} {
		equal(t, "sent id", strings.Join(gateway.Calls()[i].Metadata.Get("x-request-id"), "|"), expected)
		equal(t, "of the context", strings.Join(gateway.Calls()[i].Metadata.Get("x-mine"), "|"), "1")
		equal(t, "token", strings.Join(gateway.Calls()[i].Metadata.Get("authorization"), "|"), "Bearer t")
	}
	equal(t, "traceparent", gateway.Calls()[0].Metadata.Get("traceparent")[0], "00-1")
	equal(t, "binary", gateway.Calls()[0].Metadata.Get("x-raw-bin")[0], "\x00\xff")

	for _, option := range []tokenwire.CallOption{
		tokenwire.WithRequestID(""), tokenwire.WithRequestID("a\nb"), tokenwire.WithRequestID("é"),
		tokenwire.WithMetadata("Authorization", "x"), tokenwire.WithMetadata("x-request-id", "x"),
		tokenwire.WithMetadata("x-text", "a\nb"),
	} {
		_, err := client.Chat(ctx, hi, option)
		equal(t, "chat", failure(t, err).Reason, tokenwire.ReasonInvalidRequest)
		_, err = client.Stream(ctx, hi, option).Reply()
		equal(t, "stream", failure(t, err).Reason, tokenwire.ReasonInvalidRequest)
		_, err = client.BatchOrdered(ctx, []tokenwire.Request{hi}, option)
		equal(t, "batch", failure(t, err).Reason, tokenwire.ReasonInvalidRequest)
	}
	var header metadata.MD
	must[*tokenwire.Reply](t)(client.Chat(ctx, hi, tokenwire.WithGRPC(grpc.Header(&header))))
	if len(header.Get("content-type")) == 0 {
		t.Errorf("options of gRPC are passed on: %v", header)
	}
	equal(t, "calls", len(gateway.Calls()), 3)
}

// --- tokens and models --------------------------------------------------------------

func TestTokens(t *testing.T) {
	gateway, client := started(t)
	count := must[tokenwire.TokenCount](t)(client.CountTokens(ctx, "m", "three words here"))
	equal(t, "count", count, tokenwire.TokenCount{Total: 3, Tokenizer: "words"})
	equal(t, "text", gateway.Calls()[0].Request.(*pb.CountTokensRequest).GetText(), "three words here")
	count = must[tokenwire.TokenCount](t)(client.CountChatTokens(ctx, tokenwire.Request{
		Model: "m", Messages: []tokenwire.Message{tokenwire.System("be short")}, Prompt: "Hi",
	}))
	equal(t, "count of a chat", count.Total, 3)
	lists := must[[]tokenwire.Tokens](t)(client.Tokenize(ctx, "m", []string{"a b", ""}))
	equal(t, "lists", len(lists), 2)
	equal(t, "ids", len(lists[0].IDs)*10+len(lists[1].IDs), 20)
	equal(t, "pieces", string(bytes.Join(lists[0].Pieces, []byte("|"))), "a|b")
}

func TestModelsOfAllPages(t *testing.T) {
	t.Parallel()
	names := make([]string, 250)
	for i := range names {
		names[i] = "model-" + strings.Repeat("x", i)
	}
	gateway := tokenwiretest.NewGateway(t, tokenwiretest.WithModels(names...))
	client := gateway.Client(t)
	models := must[[]tokenwire.Model](t)(client.Models(ctx))
	equal(t, "models", len(models), 250)
	for i, model := range models {
		equal(t, "name", model.Name, names[i])
	}
	equal(t, "pages", len(gateway.Calls()), 3)
	one := must[tokenwire.Model](t)(client.Model(ctx, names[7]))
	equal(t, "model", one.Name+" "+one.Upstream, names[7]+" fake")
	_, err := client.Model(ctx, "nobody")
	equal(t, "reason", errors.Is(err, tokenwire.ReasonModelNotFound), true)
}

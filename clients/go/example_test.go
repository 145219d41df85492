package tokenwire_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"testing"
	"time"

	tokenwire "github.com/tokenwire/tokenwire/clients/go"
	"github.com/tokenwire/tokenwire/clients/go/tokenwiretest"
)

// The bodies of these examples are the snippets of README.md: TestReadme compares them.

// connected returns what the snippets begin with: a context, and a client of a gateway that
// answers as scripted.
func connected(script func(*tokenwiretest.Gateway)) (context.Context, *tokenwire.Client, func()) {
	gateway, err := tokenwiretest.Start()
	if err != nil {
		log.Fatal(err)
	}
	script(gateway)
	client, err := tokenwire.New(gateway.Target)
	if err != nil {
		log.Fatal(err)
	}
	return context.Background(), client, func() {
		_ = client.Close()
		gateway.Close()
	}
}

func ExampleNew() {
	client, err := tokenwire.New("gateway.internal:443",
		tokenwire.WithToken("my-token"),
		tokenwire.WithTLS(nil),
	)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	// Output:
}

func ExampleClient_Chat() {
	ctx, client, done := connected(func(gateway *tokenwiretest.Gateway) {
		gateway.Reply(tokenwiretest.Text("Rayleigh."))
	})
	defer done()

	reply, err := client.Chat(ctx, tokenwire.Request{
		Model:       "gpt-4o-mini",
		Prompt:      "Why is the sky blue?",
		Temperature: tokenwire.Ptr(0.0),
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(reply.Text())
	fmt.Println(reply.FinishReason(), reply.Usage.TotalTokens, reply.Header.Upstream)
	// Output:
	// Rayleigh.
	// stop 6 fake
}

func ExampleReply_Message() {
	ctx, client, done := connected(func(gateway *tokenwiretest.Gateway) {
		gateway.Reply(tokenwiretest.Text("Short waves."))
		gateway.Reply(tokenwiretest.Text("Long way."))
	})
	defer done()

	conversation := []tokenwire.Message{
		tokenwire.System("Answer in one sentence."),
		tokenwire.User("Why is the sky blue?"),
	}
	reply, err := client.Chat(ctx, tokenwire.Request{Model: "gpt-4o-mini", Messages: conversation})
	if err != nil {
		log.Fatal(err)
	}
	conversation = append(conversation, reply.Message(), tokenwire.User("And at sunset?"))
	reply, err = client.Chat(ctx, tokenwire.Request{Model: "gpt-4o-mini", Messages: conversation})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(reply.Text())
	// Output:
	// Long way.
}

func ExampleDecode() {
	ctx, client, done := connected(func(gateway *tokenwiretest.Gateway) {
		gateway.Reply(tokenwiretest.Text(`{"city": "Oslo", `, `"degrees": -3}`))
	})
	defer done()

	type Weather struct {
		City    string
		Degrees float64
	}
	reply, err := client.Chat(ctx, tokenwire.Request{
		Model:  "gpt-4o-mini",
		Prompt: "Weather in Oslo?",
		Format: tokenwire.JSONSchema(`{
			"type": "object",
			"properties": {"city": {"type": "string"}, "degrees": {"type": "number"}},
			"required": ["city", "degrees"]
		}`),
	})
	if err != nil {
		log.Fatal(err)
	}
	weather, err := tokenwire.Decode[Weather](reply)
	if err != nil {
		log.Fatal(err) // not JSON, as when the answer was cut off
	}
	fmt.Println(weather.City, weather.Degrees)
	// Output:
	// Oslo -3
}

func ExampleStream_All() {
	ctx, client, done := connected(func(gateway *tokenwiretest.Gateway) {
		gateway.Reply(tokenwiretest.Text("Once", " upon"))
	})
	defer done()

	stream := client.Stream(ctx, tokenwire.Request{Model: "gpt-4o-mini", Prompt: "Tell me a story."})
	for event, err := range stream.All() {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Print(event.Text)
	}
	fmt.Println()
	reply, err := stream.Reply() // the whole answer, as Chat returns it
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(reply.Usage.CompletionTokens, "tokens")
	// Output:
	// Once upon
	// 2 tokens
}

func ExampleStream_Text() {
	ctx, client, done := connected(func(gateway *tokenwiretest.Gateway) {
		gateway.Reply(tokenwiretest.Text("a", " time"))
	})
	defer done()

	request := tokenwire.Request{Model: "gpt-4o-mini", Prompt: "Tell me a story."}
	for text, err := range client.Stream(ctx, request).Text() {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Print(text)
	}
	// Output:
	// a time
}

func ExampleToolCall() {
	ctx, client, done := connected(func(gateway *tokenwiretest.Gateway) {
		gateway.Reply(tokenwiretest.ToolCall("weather", `{"city": "Rome"}`))
		gateway.Reply(tokenwiretest.ToolCall("weather", `{"ci`))
		gateway.Reply(tokenwiretest.Text("Yes."))
	})
	defer done()

	request := tokenwire.Request{
		Model:    "gpt-4o-mini",
		Messages: []tokenwire.Message{tokenwire.User("Is it warm in Rome?")},
		Tools: []tokenwire.Tool{{
			Name:        "weather",
			Description: "Current weather of a city",
			Parameters:  `{"type": "object", "properties": {"city": {"type": "string"}}}`,
		}},
	}
	for {
		reply, err := client.Chat(ctx, request)
		if err != nil {
			log.Fatal(err)
		}
		if len(reply.ToolCalls()) == 0 {
			fmt.Println(reply.Text())
			break
		}
		request.Messages = append(request.Messages, reply.Message())
		for _, call := range reply.ToolCalls() {
			var arguments struct{ City string }
			if err := call.Decode(&arguments); err != nil {
				// The model wrote no JSON; what it wrote is in call.RawArguments.
				request.Messages = append(request.Messages, call.Answer(err.Error()))
				continue
			}
			answer, err := call.AnswerJSON(map[string]any{"city": arguments.City, "degrees": 21})
			if err != nil {
				log.Fatal(err)
			}
			request.Messages = append(request.Messages, answer)
		}
	}
	// Output:
	// Yes.
}

func ExampleStream_SoFar() {
	ctx, client, done := connected(func(gateway *tokenwiretest.Gateway) {
		gateway.Hang(tokenwiretest.Text("one two three ", "four five six"))
	})
	defer done()

	stream := client.Stream(ctx, tokenwire.Request{Model: "gpt-4o-mini", Prompt: "Count to a million."})
	for _, err := range stream.All() {
		if err != nil {
			log.Fatal(err)
		}
		if len(stream.SoFar().Text()) > 20 {
			break
		}
	}
	fmt.Println(stream.SoFar().Text()) // what had arrived
	// Output:
	// one two three four five six
}

func ExampleError() {
	ctx, client, done := connected(func(gateway *tokenwiretest.Gateway) {
		gateway.Fail(tokenwiretest.Failure{
			Reason: tokenwire.ReasonRateLimited, RetryAfter: 1500 * time.Millisecond,
			Metadata: map[string]string{"requestId": "r-1"},
		})
	})
	defer done()

	_, err := client.Chat(ctx, tokenwire.Request{Model: "gpt-4o-mini", Prompt: "Hi"})
	var failed *tokenwire.Error
	if errors.As(err, &failed) {
		fmt.Println(failed.Code)      // ResourceExhausted, of package codes
		fmt.Println(failed.Reason)    // RATE_LIMITED, from the ErrorReason of the contract
		fmt.Println(failed.RequestID) // find it in the gateway's log
		if after, ok := failed.RetryAfter(); ok {
			fmt.Println(after)
		}
	}
	fmt.Println(errors.Is(err, tokenwire.ReasonRateLimited))
	// Output:
	// ResourceExhausted
	// RATE_LIMITED
	// r-1
	// 1.5s
	// true
}

func ExampleError_PartialText() {
	ctx, client, done := connected(func(gateway *tokenwiretest.Gateway) {
		gateway.Fail(tokenwiretest.Failure{
			Reason: tokenwire.ReasonUpstreamStreamInterrupted,
			After:  []tokenwiretest.Part{tokenwiretest.Text("Once")},
		})
	})
	defer done()

	stream := client.Stream(ctx, tokenwire.Request{Model: "gpt-4o-mini", Prompt: "Tell me a story."})
	for text, err := range stream.Text() {
		var failed *tokenwire.Error
		if errors.As(err, &failed) {
			fmt.Printf("\n[%s after %d bytes]\n", failed.Reason, len(failed.PartialText()))
			break
		}
		fmt.Print(text)
	}
	// Output:
	// Once
	// [UPSTREAM_STREAM_INTERRUPTED after 4 bytes]
}

func ExampleError_IsRetryable() {
	ctx, client, done := connected(func(gateway *tokenwiretest.Gateway) {
		gateway.Fail(tokenwiretest.Failure{Reason: tokenwire.ReasonRateLimited, RetryAfter: 10 * time.Millisecond})
		gateway.Reply(tokenwiretest.Text("Hi!"))
	})
	defer done()

	ask := func() (*tokenwire.Reply, error) {
		for attempt := 1; ; attempt++ {
			reply, err := client.Chat(ctx, tokenwire.Request{Model: "gpt-4o-mini", Prompt: "Hi"})
			var failed *tokenwire.Error
			if !errors.As(err, &failed) || !failed.IsRetryable() || attempt == 5 {
				return reply, err
			}
			wait, ok := failed.RetryAfter()
			if !ok {
				wait = time.Second << attempt
			}
			select {
			case <-time.After(wait):
			case <-ctx.Done():
				return nil, err
			}
		}
	}
	reply, err := ask()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(reply.Text())
	// Output:
	// Hi!
}

func ExampleClient_Batch() {
	ctx, client, done := connected(func(gateway *tokenwiretest.Gateway) {
		gateway.Reply(tokenwiretest.Text("2"))
		gateway.Reply(tokenwiretest.Text("Oslo"))
		gateway.Reply(tokenwiretest.Text("old pond"))
		gateway.Reply(tokenwiretest.Text("2"))
		gateway.Reply(tokenwiretest.Text("Oslo"))
		gateway.Reply(tokenwiretest.Text("frog"))
	})
	defer done()

	requests := []tokenwire.Request{
		{Model: "gpt-4o-mini", Prompt: "1 + 1?"},
		{Model: "gpt-4o-mini", Prompt: "Capital of Norway?"},
		{Model: "gpt-4o-mini", Prompt: "Haiku?", CustomID: "haiku"},
	}
	for result, err := range client.Batch(ctx, requests) { // each as soon as it is ready
		if err != nil {
			log.Fatal(err) // of the batch as a whole
		}
		if result.Err != nil {
			fmt.Println(result.Index, result.Err)
			continue
		}
		fmt.Println(result.Index, result.CustomID, result.Reply.Text())
	}

	results, err := client.BatchOrdered(ctx, requests) // in order, all at the end
	if err != nil {
		log.Fatal(err)
	}
	for _, result := range results {
		if result.Err == nil {
			fmt.Println(result.Reply.Text())
		}
	}
	// Output:
	// 2 haiku old pond
	// 1  Oslo
	// 0  2
	// 2
	// Oslo
	// frog
}

func ExampleClient_CountTokens() {
	ctx, client, done := connected(func(*tokenwiretest.Gateway) {})
	defer done()

	count, err := client.CountTokens(ctx, "gpt-4o-mini", "How many tokens?")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(count.Total)

	lists, err := client.Tokenize(ctx, "gpt-4o-mini", []string{"How many tokens?"})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%v %s\n", lists[0].IDs, lists[0].Pieces)

	models, err := client.Models(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(models[0].Name)
	// Output:
	// 3
	// [0 1 2] [How many tokens?]
	// gpt-4o-mini
}

func TestAnInterruptedStory(t *testing.T) {
	gateway := tokenwiretest.NewGateway(t)
	client := gateway.Client(t)
	gateway.Reply(tokenwiretest.Text("Once upon", " a time"))
	gateway.Reply(tokenwiretest.ToolCall("weather", map[string]string{"city": "Rome"}))
	gateway.Fail(tokenwiretest.Failure{
		Reason: tokenwire.ReasonUpstreamStreamInterrupted,
		After:  []tokenwiretest.Part{tokenwiretest.Text("Once ")},
	})
	request := tokenwire.Request{Model: "any", Prompt: "A story!"}

	story, err := client.Chat(context.Background(), request)
	if err != nil || story.Text() != "Once upon a time" {
		t.Errorf("got %v, %v", story, err)
	}
	weather, err := client.Chat(context.Background(), request)
	if err != nil || weather.ToolCalls()[0].Name != "weather" {
		t.Errorf("got %v, %v", weather, err)
	}
	_, err = client.Stream(context.Background(), request).Reply()
	var failed *tokenwire.Error
	if !errors.As(err, &failed) || failed.PartialText() != "Once " {
		t.Errorf("got %v", err)
	}
	if asked := gateway.Calls()[0].Chat(); asked.GetMessages()[0].GetContent() != "A story!" {
		t.Errorf("asked %v", asked)
	}
}

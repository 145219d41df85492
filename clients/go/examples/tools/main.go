// Tools lets a model call two functions; the answer and the calls arrive as a stream.
//
//	go run ./examples/tools [MODEL]
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"maps"
	"os"
	"slices"

	tokenwire "github.com/tokenwire/tokenwire/clients/go"
)

var weather = map[string]int{"Oslo": -3, "Rome": 21}

var tools = []tokenwire.Tool{
	{
		Name:        "weather",
		Description: "Temperature in a city, in degrees Celsius",
		Parameters: `{
			"type": "object",
			"properties": {"city": {"type": "string"}},
			"required": ["city"]
		}`,
	},
	{Name: "cities", Description: "Names of the cities that have a thermometer"},
}

func main() {
	model := "gpt-4o-mini"
	if len(os.Args) > 1 {
		model = os.Args[1]
	}
	client, err := tokenwire.New("") // TOKENWIRE_TARGET, TOKENWIRE_TOKEN
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	if err := ask(context.Background(), client, model, os.Stdout); err != nil {
		log.Fatal(err)
	}
}

func ask(ctx context.Context, client *tokenwire.Client, model string, out io.Writer) error {
	request := tokenwire.Request{
		Model:    model,
		Messages: []tokenwire.Message{tokenwire.User("Where is it warmer, Oslo or Rome?")},
		Tools:    tools,
	}
	for {
		stream := client.Stream(ctx, request)
		for text, err := range stream.Text() {
			if err != nil {
				return err
			}
			fmt.Fprint(out, text)
		}
		fmt.Fprintln(out)
		reply := stream.SoFar() // whole: the loop has ended without an error
		if len(reply.ToolCalls()) == 0 {
			return nil
		}
		request.Messages = append(request.Messages, reply.Message())
		for _, call := range reply.ToolCalls() {
			result := run(call)
			fmt.Fprintf(out, "[%s %s -> %v]\n", call.Name, call.RawArguments, result)
			answer, err := call.AnswerJSON(result)
			if err != nil {
				return err
			}
			request.Messages = append(request.Messages, answer)
		}
	}
}

// run returns what the model asked for, or an answer it understands when it asked for nonsense.
func run(call tokenwire.ToolCall) any {
	switch call.Name {
	case "cities":
		return slices.Sorted(maps.Keys(weather))
	case "weather":
		var arguments struct{ City string }
		if err := call.Decode(&arguments); err != nil {
			return err.Error() // let it try again
		}
		if degrees, ok := weather[arguments.City]; ok {
			return degrees
		}
		return "no such city"
	}
	return "no such tool: " + call.Name
}

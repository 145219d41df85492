// Conversation talks with a model at the terminal: it streams each answer, Ctrl-C stops one, Ctrl-D
// ends.
//
//	go run ./examples/conversation [MODEL]
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"

	tokenwire "github.com/tokenwire/tokenwire/clients/go"
)

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
	talk(client, model, os.Stdin, os.Stdout)
}

func talk(client *tokenwire.Client, model string, in io.Reader, out io.Writer) {
	request := tokenwire.Request{Model: model}
	questions := bufio.NewScanner(in)
	for {
		fmt.Fprint(out, "> ")
		if !questions.Scan() || questions.Text() == "" {
			return
		}
		request.Messages = append(request.Messages, tokenwire.User(questions.Text()))
		stopped := answer(client, request, out)
		// What has arrived is what the person has seen: keep it in any case.
		request.Messages = append(request.Messages, tokenwire.Assistant(stopped))
	}
}

// answer prints an answer as it grows, until its end or Ctrl-C, and returns what has arrived.
func answer(client *tokenwire.Client, request tokenwire.Request, out io.Writer) string {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	stream := client.Stream(ctx, request)
	for text, err := range stream.Text() {
		switch {
		case errors.Is(err, context.Canceled):
			fmt.Fprint(out, " [stopped]")
		case err != nil:
			fmt.Fprintf(out, " [%v]", err)
		default:
			fmt.Fprint(out, text)
		}
	}
	fmt.Fprintln(out)
	return stream.SoFar().Text()
}

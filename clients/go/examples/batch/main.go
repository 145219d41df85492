// Batch asks many questions at once, one per line of standard input, and prints a table of answers;
// errors go to standard error.
//
//	go run ./examples/batch [MODEL] < questions.txt
package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"strings"

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
	failed, err := ask(context.Background(), client, model, os.Stdin, os.Stdout, os.Stderr)
	client.Close()
	if err != nil {
		log.Fatal(err)
	}
	if failed > 0 {
		os.Exit(1)
	}
}

// ask returns how many questions failed, or the error of the batch as a whole.
func ask(ctx context.Context, client *tokenwire.Client, model string, in io.Reader, out, errs io.Writer) (failed int, err error) {
	var requests []tokenwire.Request
	for lines := bufio.NewScanner(in); lines.Scan(); {
		if question := strings.TrimSpace(lines.Text()); question != "" {
			requests = append(requests, tokenwire.Request{
				Model: model, Prompt: question, MaxCompletionTokens: tokenwire.Ptr(100),
			})
		}
	}
	for result, err := range client.Batch(ctx, requests) {
		if err != nil {
			return failed, err
		}
		if result.Err != nil {
			failed++
			fmt.Fprintf(errs, "%d\t%v\n", result.Index, result.Err)
			continue
		}
		fmt.Fprintf(out, "%d\t%q\n", result.Index, result.Reply.Text())
	}
	return failed, nil
}

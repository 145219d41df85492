// Load asks a gateway without a pause, with the client's default options, and tells what came of each
// call as a line of JSON: see tests/rolling.
//
//	load TARGET WORKERS
//
// Each worker streams, every fourth time asks for a whole answer instead, and begins the next call
// when the last has ended, until standard input ends. The prompt of a call is its id.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"strconv"
	"sync"
	"sync/atomic"

	tokenwire "github.com/tokenwire/tokenwire/clients/go"
)

type outcome struct {
	ID     string `json:"id"`
	Text   string `json:"text"`
	Code   string `json:"code"` // "OK", or what the call failed with
	Reason string `json:"reason"`
	Error  string `json:"error"`
}

func main() {
	if len(os.Args) != 3 {
		log.Fatal("load TARGET WORKERS")
	}
	workers, err := strconv.Atoi(os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	client, err := tokenwire.New(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	var ending atomic.Bool
	go func() {
		_, _ = io.Copy(io.Discard, bufio.NewReader(os.Stdin))
		ending.Store(true)
	}()
	outcomes := make(chan outcome)
	var working sync.WaitGroup
	for worker := range workers {
		working.Add(1)
		go func() {
			defer working.Done()
			for call := 0; !ending.Load(); call++ {
				outcomes <- ask(client, fmt.Sprintf("go-%d-%d", worker, call), call%4 == 3)
			}
		}()
	}
	go func() {
		working.Wait()
		close(outcomes)
	}()
	output := json.NewEncoder(os.Stdout)
	for each := range outcomes {
		if err := output.Encode(each); err != nil {
			log.Fatal(err)
		}
	}
}

func ask(client *tokenwire.Client, id string, whole bool) outcome {
	ctx := context.Background()
	request := tokenwire.Request{Model: "m", Prompt: id}
	if whole {
		reply, err := client.Chat(ctx, request)
		if err != nil {
			return failed(id, "", err)
		}
		return outcome{ID: id, Text: reply.Text(), Code: "OK"}
	}
	stream := client.Stream(ctx, request)
	text := ""
	for piece, err := range stream.Text() {
		if err != nil {
			return failed(id, text, err)
		}
		text += piece
	}
	return outcome{ID: id, Text: text, Code: "OK"}
}

func failed(id, text string, err error) outcome {
	var failure *tokenwire.Error
	if !errors.As(err, &failure) {
		return outcome{ID: id, Text: text, Code: "?", Error: err.Error()}
	}
	return outcome{
		ID: id, Text: text, Code: failure.Code.String(), Reason: string(failure.Reason), Error: err.Error(),
	}
}

// Story is the README's first program: an answer as it grows.
package main

import (
	"context"
	"fmt"
	"log"

	tokenwire "github.com/tokenwire/tokenwire/clients/go"
)

func main() {
	client, err := tokenwire.New("localhost:50051")
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	request := tokenwire.Request{Model: "gpt-4o-mini", Prompt: "Tell me a story."}
	for text, err := range client.Stream(context.Background(), request).Text() {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Print(text)
	}
	fmt.Println()
}

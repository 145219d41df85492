// Package tokenwire is the client of a Tokenwire gateway: chat with any model behind it, one
// answer at a time, as a stream or in batches.
//
//	client, err := tokenwire.New("gateway.internal:443", tokenwire.WithTLS(nil))
//	...
//	for text, err := range client.Stream(ctx, tokenwire.Request{
//		Model: "gpt-4o-mini", Prompt: "Tell me a story.",
//	}).Text() {
//		if err != nil {
//			return err
//		}
//		fmt.Print(text)
//	}
//
// Leaving the loop ends the call, at the gateway and at the upstream. A loop that ends without an
// error has seen the whole answer. Every error is an [*Error].
//
// Package tokenwiretest has a gateway for the tests of your own code, and package tokenwire/v1
// the messages of the contract, for what this package does not wrap.
package tokenwire

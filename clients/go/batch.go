package tokenwire

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"

	pb "github.com/tokenwire/tokenwire/clients/go/tokenwire/v1"
)

// BatchResult is how one request of a batch ended: exactly one of Reply and Err is set.
type BatchResult struct {
	// Index of the request.
	Index int
	// CustomID of the request; "" when it had none.
	CustomID string
	Reply    *Reply
	// Err is an [*Error], as Chat would have returned it.
	Err error
}

// Batch answers 1 to 256 requests that do not depend on each other, and yields each result as soon
// as it is there. A request that fails does not fail the others: its error is in its result.
//
//	for result, err := range client.Batch(ctx, requests) { ... }
//
// err is that of the batch as a whole, and the last thing it yields. A loop that ends without one
// has seen the result of every request. Leaving the loop ends the call.
func (c *Client) Batch(ctx context.Context, requests []Request, options ...BatchOption) iter.Seq2[BatchResult, error] {
	return func(yield func(BatchResult, error) bool) {
		if err := c.batch(ctx, requests, options, func(result BatchResult) bool {
			return yield(result, nil)
		}); err != nil {
			yield(BatchResult{}, err)
		}
	}
}

// BatchOrdered is like Batch, with all results at once and in the order of the requests.
//
// If the batch fails as a whole after some results, those that did arrive are returned, for they
// have been paid for, and the others have that failure as their Err. It returns an error when there
// is no result at all, when ctx is cancelled, and when some results were of no request.
func (c *Client) BatchOrdered(ctx context.Context, requests []Request, options ...BatchOption) ([]BatchResult, error) {
	results := make([]BatchResult, len(requests))
	arrived := 0
	failure := c.batch(ctx, requests, options, func(result BatchResult) bool {
		results[result.Index] = result
		arrived++
		return true
	})
	if failure != nil {
		var told *Error
		// Nobody knows whose the others are where some were of no request.
		mixedUp := errors.As(failure, &told) && told.mixedUp
		if arrived == 0 || mixedUp || errors.Is(ctx.Err(), context.Canceled) {
			return nil, failure
		}
	}
	for i, result := range results {
		if result.Reply == nil && result.Err == nil {
			results[i] = BatchResult{Index: i, CustomID: requests[i].CustomID, Err: failure}
		}
	}
	return results, nil
}

// batch hands over each result, until give returns false; it returns the failure of the whole.
func (c *Client) batch(ctx context.Context, requests []Request, options []BatchOption, give func(BatchResult) bool) error {
	call := &call{}
	for _, option := range options {
		if err := option.applyBatch(call); err != nil {
			return err
		}
	}
	message := &pb.BatchChatRequest{MaxConcurrency: call.maxConcurrency}
	if len(requests) == 0 {
		return refused("items", "expected at least one")
	}
	for i, request := range requests {
		where := fmt.Sprintf("items[%d]", i)
		chat, err := request.proto()
		if err != nil {
			return err.within(where + ".chat")
		}
		if err := checkText(where+".custom_id", request.CustomID); err != nil {
			return err
		}
		message.Items = append(message.Items, &pb.BatchChatItem{CustomId: request.CustomID, Chat: chat})
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // however the loop is left
	ctx, refusal := call.outgoing(ctx)
	if refusal != nil {
		return refusal
	}
	rpc, err := c.chat.BatchChat(ctx, message, call.grpc...)
	if err != nil {
		return fromCall(err, nil, call.requestID)
	}
	got := make([]bool, len(requests))
	missing := len(requests)
	for {
		response, err := rpc.Recv()
		switch {
		case errors.Is(err, io.EOF) && missing > 0:
			return incomplete(fmt.Sprintf("the batch ended with OK but without the result of %d of %d requests",
				missing, len(requests)), call.requestID)
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fromCall(err, rpc.Trailer(), call.requestID)
		}
		result := BatchResult{Index: int(response.GetIndex()), CustomID: response.GetCustomId()}
		switch r := response.GetResult().(type) {
		case *pb.BatchChatResponse_Response:
			result.Reply = newReply(r.Response, call.requestID)
		case *pb.BatchChatResponse_Error:
			result.Err = fromStatus(r.Error, call.requestID)
		default:
			continue // a heartbeat, or newer than this package
		}
		if result.Index < 0 || result.Index >= len(got) || got[result.Index] {
			failure := incomplete(fmt.Sprintf("got a result of request %d that is not asked for, or had one",
				result.Index), call.requestID)
			failure.mixedUp = true
			return failure
		}
		got[result.Index] = true
		missing--
		if !give(result) {
			return nil
		}
	}
}

// within returns the error of a part of a request, with the place of the part before it.
func (e *Error) within(where string) *Error {
	v := e.FieldViolations[0] // made by refused
	return refused(where+"."+v.Field, "%s", v.Description)
}

package tokenwire

import (
	"context"
	"errors"
	"io"
	"iter"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	pb "github.com/tokenwire/tokenwire/clients/go/tokenwire/v1"
)

// Stream is an answer as it grows: read it by All or Text. One goroutine reads; every other
// method may be called from any.
type Stream struct {
	ctx     context.Context
	client  *Client
	call    *call
	request *pb.StreamChatRequest

	mu      sync.Mutex
	answer  Accumulator
	rpc     grpc.ServerStreamingClient[pb.StreamChatResponse]
	cancel  context.CancelFunc
	begun   time.Time
	ttft    time.Duration
	hasTTFT bool
	closed  bool
	end     error // io.EOF after a whole answer, else an *Error; nil while it runs
}

// Stream asks for an answer as it grows. The call begins when it is first read, and ends when the
// loop over it is left, when ctx is done, or by Close. What is wrong with the request, too, is
// told by the loop.
//
//	for text, err := range client.Stream(ctx, request).Text() { ... }
//
// A stream has no deadline but that of ctx: while it is silent, keepalive pings notice a
// connection that died.
func (c *Client) Stream(ctx context.Context, request Request, options ...StreamOption) *Stream {
	s := &Stream{ctx: ctx, client: c, call: &call{mode: pb.StreamMode_STREAM_MODE_DELTA}}
	chat, refusal := request.proto()
	for _, option := range options {
		if refusal == nil {
			refusal = option.applyStream(s.call)
		}
	}
	if refusal == nil {
		s.ctx, refusal = s.call.outgoing(ctx)
	}
	if refusal != nil {
		s.end = refusal
	}
	// It is sent when the stream is first read, and must not notice what becomes of request until then.
	chat = proto.CloneOf(chat)
	s.request = &pb.StreamChatRequest{Chat: chat, Mode: s.call.mode, MaxDelay: s.call.maxDelay}
	return s
}

// All iterates over the events. An error, always an [*Error] with what had arrived in Partial, is
// the last thing it yields; a loop that ends without one has seen the whole answer. Leaving the
// loop by break, return or panic ends the call.
func (s *Stream) All() iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		defer s.Close()
		for {
			event, err := s.next()
			if errors.Is(err, io.EOF) {
				return
			}
			if !yield(event, err) || err != nil {
				return
			}
		}
	}
}

// Text iterates over the new text of the first choice, and is otherwise like All.
func (s *Stream) Text() iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		for event, err := range s.All() {
			if err == nil && (event.Text == "" || event.ChoiceIndex != 0) {
				continue
			}
			if !yield(event.Text, err) {
				return
			}
		}
	}
}

// Reply reads what is left of the stream and returns the whole answer, as Chat does.
func (s *Stream) Reply() (*Reply, error) {
	for {
		s.mu.Lock()
		whole := s.answer.IsComplete() && (s.end == nil && s.closed || errors.Is(s.end, io.EOF))
		s.mu.Unlock()
		if whole { // also when the loop was left at the last event
			return s.SoFar(), nil
		}
		if _, err := s.next(); err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
	}
}

// SoFar returns what has arrived: text, tool calls assembled, and in the end Usage. It does not
// change any more, and costs little however long the text is.
func (s *Stream) SoFar() *Reply {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.answer.soFar(s.call.requestID)
}

// IsComplete tells whether the whole answer has arrived.
func (s *Stream) IsComplete() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.answer.IsComplete()
}

// TimeToFirstToken returns the time from the begin of the call to the model's first output; false
// before it.
func (s *Stream) TimeToFirstToken() (time.Duration, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ttft, s.hasTTFT
}

// RequestID returns the call's x-request-id.
func (s *Stream) RequestID() string { return s.call.requestID }

// Close ends the call, at the gateway and at the upstream, unless it has ended. A loop that still
// reads then yields an error with the code Canceled. It never fails, and may be called twice.
func (s *Stream) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.cancel != nil {
		s.cancel()
	}
	return nil
}

// next returns the next event, io.EOF after a whole answer, else an *Error.
func (s *Stream) next() (Event, error) {
	rpc, err := s.open()
	if err != nil {
		return Event{}, err
	}
	for {
		message, err := rpc.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return Event{}, s.over(nil)
		case err != nil:
			return Event{}, s.over(fromCall(err, rpc.Trailer(), s.call.requestID))
		}
		if event, ok := s.add(message); ok {
			return event, nil
		}
	}
}

func (s *Stream) open() (grpc.ServerStreamingClient[pb.StreamChatResponse], error) {
	s.mu.Lock()
	if s.end != nil || s.rpc != nil {
		defer s.mu.Unlock()
		return s.rpc, s.end
	}
	if s.closed {
		s.end = &Error{
			Code: codes.Canceled, Message: "the stream was closed before it was read",
			RequestID: s.call.requestID, Partial: s.answer.soFar(s.call.requestID),
		}
		defer s.mu.Unlock()
		return nil, s.end
	}
	var ctx context.Context
	ctx, s.cancel = context.WithCancel(s.ctx)
	s.begun = time.Now()
	s.mu.Unlock()
	// Without the lock: this may wait for a connection, and Close must end that wait.
	rpc, err := s.client.chat.StreamChat(ctx, s.request, s.call.grpc...)
	if err != nil {
		return nil, s.over(fromCall(err, nil, s.call.requestID))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rpc = rpc
	return rpc, nil
}

func (s *Stream) add(message *pb.StreamChatResponse) (Event, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	event, ok := s.answer.Add(message)
	if ok && !s.hasTTFT && event.hasToken() {
		s.ttft, s.hasTTFT = time.Since(s.begun), true
	}
	return event, ok
}

// over notes how the call ended: with failure, or, if that is nil, with OK.
func (s *Stream) over(failure *Error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cancel() // frees what gRPC holds for the call
	if failure == nil && !s.answer.IsComplete() {
		// A wrong OK is worse than any error: the caller would take a part for the whole.
		failure = incomplete("the stream ended with OK but without its trailer: the answer is not whole",
			s.call.requestID)
	}
	if failure == nil {
		s.end = io.EOF
		return s.end
	}
	failure.Partial = s.answer.soFar(s.call.requestID)
	if failure.Reason == "" && failure.Code == codes.Unavailable && len(s.answer.choices) > 0 {
		// The gateway is gone, or what lies between: nobody was left to say so.
		failure.Reason = ReasonUpstreamStreamInterrupted
	}
	s.end = failure
	return s.end
}

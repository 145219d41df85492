package tokenwire

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

const (
	pushbackKey  = "grpc-retry-pushback-ms"
	requestIDKey = "x-request-id"
	domain       = "tokenwire"
)

// Reason says why a call failed, in one word. It is an error itself, so that
//
//	errors.Is(err, tokenwire.ReasonRateLimited)
//
// tells whether err is a call that failed for it. New reasons may be added: treat one you do not
// know by its code. What each means and asks of you is in docs/errors.md of the repository.
type Reason string

// The reasons of the contract. They come from the gateway, but for ReasonStreamIncomplete, and
// for ReasonInvalidRequest where this client refuses a request before it is sent.
const (
	ReasonInvalidRequest              Reason = "INVALID_REQUEST"
	ReasonContextLengthExceeded       Reason = "CONTEXT_LENGTH_EXCEEDED"
	ReasonUnsupportedParameter        Reason = "UNSUPPORTED_PARAMETER"
	ReasonUnknownRole                 Reason = "UNKNOWN_ROLE"
	ReasonRequestTooLarge             Reason = "REQUEST_TOO_LARGE"
	ReasonContentFiltered             Reason = "CONTENT_FILTERED"
	ReasonModelNotFound               Reason = "MODEL_NOT_FOUND"
	ReasonCallerUnauthenticated       Reason = "CALLER_UNAUTHENTICATED"
	ReasonCallerForbidden             Reason = "CALLER_FORBIDDEN"
	ReasonCallerQuotaExceeded         Reason = "CALLER_QUOTA_EXCEEDED"
	ReasonRateLimited                 Reason = "RATE_LIMITED"
	ReasonUpstreamQuotaExhausted      Reason = "UPSTREAM_QUOTA_EXHAUSTED"
	ReasonUpstreamCredentialsRejected Reason = "UPSTREAM_CREDENTIALS_REJECTED"
	ReasonUpstreamAccessDenied        Reason = "UPSTREAM_ACCESS_DENIED"
	ReasonUpstreamUnreachable         Reason = "UPSTREAM_UNREACHABLE"
	ReasonUpstreamTimeout             Reason = "UPSTREAM_TIMEOUT"
	ReasonUpstreamOverloaded          Reason = "UPSTREAM_OVERLOADED"
	ReasonUpstreamError               Reason = "UPSTREAM_ERROR"
	ReasonUpstreamProtocolError       Reason = "UPSTREAM_PROTOCOL_ERROR"
	ReasonUpstreamStreamInterrupted   Reason = "UPSTREAM_STREAM_INTERRUPTED"
	ReasonGatewayOverloaded           Reason = "GATEWAY_OVERLOADED"
	ReasonGatewayDraining             Reason = "GATEWAY_DRAINING"
	ReasonDeadlineExceeded            Reason = "DEADLINE_EXCEEDED"
	ReasonCancelled                   Reason = "CANCELLED"
	ReasonInternal                    Reason = "INTERNAL"
	ReasonCallerStalled               Reason = "CALLER_STALLED"
	ReasonTokenizerUnavailable        Reason = "TOKENIZER_UNAVAILABLE"

	// ReasonStreamIncomplete is this client's own: the server said OK before the answer was whole.
	ReasonStreamIncomplete Reason = "STREAM_INCOMPLETE"
)

// Error makes a Reason a target of [errors.Is].
func (r Reason) Error() string { return string(r) }

// A FieldViolation names one part of a request that was not accepted.
type FieldViolation struct {
	Field       string // path in the request, for example "messages[0].role"
	Description string // what was there and what was expected
}

// String returns the field with its description.
func (v FieldViolation) String() string { return v.Field + ": " + v.Description }

// Error is a call that failed. Every error of a [Client] is one:
//
//	var failed *tokenwire.Error
//	if errors.As(err, &failed) { ... }
//
// [errors.Is] also compares it with a [Reason], with [context.Canceled] and with
// [context.DeadlineExceeded]; the functions of google.golang.org/grpc/status take it as it is.
type Error struct {
	// Code is the gRPC status code.
	Code codes.Code
	// Reason is "" when the status did not come from a Tokenwire gateway: no connection, a
	// proxy, a deadline that passed here. A stream whose connection broke after some of its answer
	// had come has the reason that the gateway would give, ReasonUpstreamStreamInterrupted.
	Reason Reason
	// Message is one line for people.
	Message string
	// RequestID is the call's x-request-id, to quote to whoever runs the gateway.
	RequestID string
	// Attempts counts the upstream requests the gateway made; 0 when it did not say.
	Attempts int
	// FieldViolations are the parts of the request that were not accepted.
	FieldViolations []FieldViolation
	// Metadata is that of the ErrorInfo: "upstream", "upstreamStatus", "trail", ...
	Metadata map[string]string
	// Partial is what had arrived of a stream before it failed; otherwise nil.
	Partial *Reply

	retryAfter *time.Duration
	mixedUp    bool // results of a batch were of no request
	status     *statuspb.Status
	cause      error
}

// RetryAfter returns how long to wait before another try; false when nobody said.
func (e *Error) RetryAfter() (time.Duration, bool) {
	if e.retryAfter == nil {
		return 0, false
	}
	return *e.retryAfter, true
}

// PartialText returns the text of the first choice that had arrived; "" when none had.
func (e *Error) PartialText() string {
	if e.Partial == nil {
		return ""
	}
	return e.Partial.Text()
}

// IsRetryable tells whether the same call may succeed later, after RetryAfter if that is set.
//
// The connection and the gateway have made their own retries by then. Repeating a stream repeats,
// and bills, the part that had arrived.
func (e *Error) IsRetryable() bool {
	if e.Code == codes.ResourceExhausted {
		// Without a time to wait for, what is exhausted does not refill by itself: credit, or a
		// request larger than the limit.
		return e.retryAfter != nil
	}
	return e.Code == codes.Unavailable
}

// Error returns reason, message and what helps to find the call in a log.
func (e *Error) Error() string {
	var text strings.Builder
	if e.Reason != "" {
		text.WriteString(string(e.Reason))
	} else {
		text.WriteString(e.Code.String())
	}
	text.WriteString(": " + e.Message)
	var facts []string
	if after, ok := e.RetryAfter(); ok {
		facts = append(facts, "retry after "+after.String())
	}
	if e.Attempts > 1 {
		facts = append(facts, strconv.Itoa(e.Attempts)+" attempts")
	}
	if e.RequestID != "" {
		facts = append(facts, "request "+e.RequestID)
	}
	if len(facts) > 0 {
		text.WriteString(" (" + strings.Join(facts, ", ") + ")")
	}
	for _, violation := range e.FieldViolations {
		// A message made of its only violation does not need it again.
		if !strings.Contains(e.Message, violation.String()) {
			text.WriteString("; " + violation.String())
		}
	}
	return text.String()
}

// Is makes [errors.Is] match the error's Reason, and the errors of package context.
func (e *Error) Is(target error) bool {
	if reason, ok := target.(Reason); ok {
		return reason != "" && reason == e.Reason
	}
	switch target {
	case context.Canceled:
		return e.Code == codes.Canceled
	case context.DeadlineExceeded:
		return e.Code == codes.DeadlineExceeded
	}
	return false
}

// Unwrap returns what made this client fail the call before it was sent, such as the error of a
// token source; nil for what came over the wire.
func (e *Error) Unwrap() error { return e.cause }

// GRPCStatus returns the status with every detail as it was sent; package status uses it.
func (e *Error) GRPCStatus() *status.Status { return status.FromProto(e.Proto()) }

// Proto returns the google.rpc.Status with every detail as it was sent.
func (e *Error) Proto() *statuspb.Status {
	if e.status != nil {
		return proto.Clone(e.status).(*statuspb.Status)
	}
	return &statuspb.Status{Code: int32(e.Code), Message: e.Message}
}

// ErrorFromStatus returns the error that a status stands for; for statuses that did not come
// through a [Client]. What is not OK never becomes nil, and neither does a status of code OK.
func ErrorFromStatus(s *statuspb.Status) *Error { return fromStatus(s, "") }

func fromStatus(s *statuspb.Status, requestID string) *Error {
	code := codes.Code(s.GetCode())
	if code == codes.OK || code > codes.Unauthenticated {
		// OK where an error must be is still no success.
		code = codes.Unknown
	}
	e := &Error{Code: code, Message: s.GetMessage(), RequestID: requestID}
	e.status = proto.Clone(s).(*statuspb.Status)
	if e.status == nil {
		e.status = &statuspb.Status{}
	}
	e.status.Code = int32(code)
	if e.Message == "" {
		e.Message = "no message"
	}
	for _, detail := range s.GetDetails() {
		message, err := detail.UnmarshalNew()
		if err != nil {
			continue // a damaged or unknown detail is no reason to hide the error it came with
		}
		switch d := message.(type) {
		case *errdetails.ErrorInfo:
			if d.GetDomain() == domain && e.Reason == "" {
				e.Reason = Reason(d.GetReason())
				e.Metadata = maps.Clone(d.GetMetadata())
			}
		case *errdetails.RetryInfo:
			if d.GetRetryDelay() != nil && e.retryAfter == nil {
				after := d.GetRetryDelay().AsDuration()
				e.retryAfter = &after
			}
		case *errdetails.BadRequest:
			for _, v := range d.GetFieldViolations() {
				e.FieldViolations = append(e.FieldViolations, FieldViolation{v.GetField(), v.GetDescription()})
			}
		}
	}
	if id := e.Metadata["requestId"]; id != "" {
		e.RequestID = id
	}
	if n, err := strconv.ParseUint(e.Metadata["attempts"], 10, 31); err == nil {
		e.Attempts = int(n)
	}
	return e
}

// fromCall returns the error a finished RPC stands for.
func fromCall(err error, trailer metadata.MD, requestID string) *Error {
	var own *Error
	if errors.As(err, &own) { // made by an interceptor of this client, such as a refused token
		if own.RequestID == "" {
			own.RequestID = requestID
		}
		return own
	}
	s, ok := status.FromError(err)
	if !ok { // of an interceptor of the caller's own
		s = status.FromContextError(err)
	}
	e := fromStatus(s.Proto(), requestID)
	if echoed := first(trailer, requestIDKey); echoed != "" && e.Metadata["requestId"] == "" {
		e.RequestID = echoed
	}
	if e.retryAfter == nil {
		if ms, err := strconv.ParseUint(first(trailer, pushbackKey), 10, 32); err == nil && ms > 0 {
			after := time.Duration(ms) * time.Millisecond
			e.retryAfter = &after
		}
	}
	return e
}

func first(md metadata.MD, key string) string {
	if values := md.Get(key); len(values) > 0 {
		return values[0]
	}
	return ""
}

func incomplete(message, requestID string) *Error {
	return &Error{
		Code: codes.Internal, Reason: ReasonStreamIncomplete, Message: message, RequestID: requestID,
	}
}

// refused returns the error of a request that makes no sense, with the place.
func refused(field, format string, args ...any) *Error {
	violation := FieldViolation{field, fmt.Sprintf(format, args...)}
	return &Error{
		Code:            codes.InvalidArgument,
		Reason:          ReasonInvalidRequest,
		Message:         violation.String(),
		FieldViolations: []FieldViolation{violation},
	}
}

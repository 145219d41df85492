package tokenwire_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	tokenwire "github.com/tokenwire/tokenwire/clients/go"
	pb "github.com/tokenwire/tokenwire/clients/go/tokenwire/v1"
)

func packed(code codes.Code, details ...proto.Message) *statuspb.Status {
	s := &statuspb.Status{Code: int32(code), Message: "message"}
	for _, detail := range details {
		one, err := anypb.New(detail)
		if err != nil {
			panic(err)
		}
		s.Details = append(s.Details, one)
	}
	return s
}

func decoded(s *statuspb.Status, trailer ...string) *tokenwire.Error {
	return tokenwire.FromCall(status.FromProto(s).Err(), metadata.Pairs(trailer...), "mine")
}

var info = &errdetails.ErrorInfo{
	Reason: "RATE_LIMITED", Domain: "tokenwire", Metadata: map[string]string{"attempts": "2", "upstream": "u"},
}

func TestAllDetails(t *testing.T) {
	failed := decoded(packed(codes.Unavailable,
		&errdetails.QuotaFailure{}, info,
		&errdetails.RetryInfo{RetryDelay: durationpb.New(12500 * time.Millisecond)},
		&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: "a.b", Description: "d"}}},
	), "x-request-id", "echoed", "grpc-retry-pushback-ms", "7")
	equal(t, "code", failed.Code, codes.Unavailable)
	equal(t, "reason", failed.Reason, tokenwire.ReasonRateLimited)
	equal(t, "upstream", failed.Metadata["upstream"], "u")
	equal(t, "text", failed.Error(), "RATE_LIMITED: message (retry after 12.5s, 2 attempts, request echoed); a.b: d")
	equal(t, "details", len(failed.Proto().GetDetails()), 4)
	equal(t, "of package status", len(status.Convert(failed).Details()), 4)
	equal(t, "its code", status.Code(fmt.Errorf("wrapped: %w", failed)), codes.Unavailable)
}

func TestStatusesOfOthers(t *testing.T) {
	damaged := packed(codes.Unavailable, info)
	damaged.Details[0].Value = []byte("\xff")
	for name, s := range map[string]*statuspb.Status{
		"no details":      packed(codes.Unavailable),
		"another domain":  packed(codes.Unavailable, &errdetails.ErrorInfo{Reason: "X", Domain: "istio.io", Metadata: map[string]string{"attempts": "9"}}),
		"another detail":  packed(codes.Unavailable, &errdetails.DebugInfo{Detail: "x"}),
		"a damaged one":   damaged,
		"an unknown type": {Code: 14, Message: "message", Details: []*anypb.Any{{TypeUrl: "x/y.Z", Value: []byte("1")}}},
	} {
		failed := decoded(s)
		equal(t, name, failed.Error(), "Unavailable: message (request mine)")
		equal(t, name, failed.Attempts, 0)
		equal(t, name, len(failed.Metadata), 0)
	}
	damaged.Details = append(damaged.Details, packed(0, info).Details...)
	equal(t, "a damaged detail hides no other", decoded(damaged).Reason, tokenwire.ReasonRateLimited)
	plain := tokenwire.FromCall(errors.New("an interceptor's own"), nil, "mine")
	equal(t, "no status at all", plain.Error(), "Unknown: an interceptor's own (request mine)")
	equal(t, "an error of a context", tokenwire.FromCall(context.DeadlineExceeded, nil, "").Code, codes.DeadlineExceeded)
}

func TestPushbackTellsWhenNothingElseDoes(t *testing.T) {
	for text, expected := range map[string]time.Duration{
		"300": 300 * time.Millisecond, "-1": 0, "0": 0, "soon": 0, "": 0, "99999999999999999999": 0,
	} {
		after, ok := decoded(packed(codes.Unavailable), "grpc-retry-pushback-ms", text).RetryAfter()
		equal(t, text, after, expected)
		equal(t, text, ok, expected > 0)
		told := packed(codes.Unavailable, &errdetails.RetryInfo{RetryDelay: durationpb.New(7 * time.Second)})
		after, _ = decoded(told, "grpc-retry-pushback-ms", text).RetryAfter()
		equal(t, text, after, 7*time.Second)
	}
}

func TestIsRetryable(t *testing.T) {
	wait := &errdetails.RetryInfo{RetryDelay: durationpb.New(time.Second)}
	for code := codes.Canceled; code <= codes.Unauthenticated; code++ {
		equal(t, code.String(), decoded(packed(code)).IsRetryable(), code == codes.Unavailable)
		told := decoded(packed(code, wait)).IsRetryable()
		equal(t, code.String()+" with a delay", told, code == codes.Unavailable || code == codes.ResourceExhausted)
	}
	now := &errdetails.RetryInfo{RetryDelay: durationpb.New(0)}
	equal(t, "at once", decoded(packed(codes.ResourceExhausted, now)).IsRetryable(), true)
}

func TestErrorsIsAndAs(t *testing.T) {
	err := fmt.Errorf("asking: %w", decoded(packed(codes.ResourceExhausted, info)))
	equal(t, "its reason", errors.Is(err, tokenwire.ReasonRateLimited), true)
	equal(t, "another", errors.Is(err, tokenwire.ReasonInternal), false)
	equal(t, "none", errors.Is(decoded(packed(codes.Unknown)), tokenwire.Reason("")), false)
	equal(t, "cancelled", errors.Is(err, context.Canceled), false)
	equal(t, "cancelled", errors.Is(decoded(packed(codes.Canceled)), context.Canceled), true)
	equal(t, "deadline", errors.Is(decoded(packed(codes.DeadlineExceeded)), context.DeadlineExceeded), true)
	equal(t, "as", failure(t, err).Attempts, 2)
}

func TestAStatusThatIsNoErrorIsStillNoSuccess(t *testing.T) {
	for _, s := range []*statuspb.Status{nil, {}, {Code: 99}, {Code: -1}} {
		failed := tokenwire.ErrorFromStatus(s)
		equal(t, "code", failed.Code, codes.Unknown)
		equal(t, "text", failed.Error(), "Unknown: no message")
		equal(t, "of package status", status.Code(failed), codes.Unknown)
	}
}

func TestEveryReasonOfTheContractHasItsName(t *testing.T) {
	named := map[tokenwire.Reason]bool{}
	for _, reason := range []tokenwire.Reason{
		tokenwire.ReasonInvalidRequest, tokenwire.ReasonContextLengthExceeded,
		tokenwire.ReasonUnsupportedParameter, tokenwire.ReasonUnknownRole, tokenwire.ReasonRequestTooLarge,
		tokenwire.ReasonContentFiltered, tokenwire.ReasonModelNotFound, tokenwire.ReasonCallerUnauthenticated,
		tokenwire.ReasonCallerForbidden, tokenwire.ReasonCallerQuotaExceeded, tokenwire.ReasonRateLimited,
		tokenwire.ReasonUpstreamQuotaExhausted, tokenwire.ReasonUpstreamCredentialsRejected,
		tokenwire.ReasonUpstreamAccessDenied, tokenwire.ReasonUpstreamUnreachable, tokenwire.ReasonUpstreamTimeout,
		tokenwire.ReasonUpstreamOverloaded, tokenwire.ReasonUpstreamError, tokenwire.ReasonUpstreamProtocolError,
		tokenwire.ReasonUpstreamStreamInterrupted, tokenwire.ReasonGatewayOverloaded,
		tokenwire.ReasonGatewayDraining, tokenwire.ReasonDeadlineExceeded, tokenwire.ReasonCancelled,
		tokenwire.ReasonInternal, tokenwire.ReasonCallerStalled, tokenwire.ReasonTokenizerUnavailable,
	} {
		named[reason] = true
	}
	for number, name := range pb.ErrorReason_name {
		if number != 0 && !named[tokenwire.Reason(strings.TrimPrefix(name, "ERROR_REASON_"))] {
			t.Errorf("%s has no constant", name)
		}
	}
	equal(t, "constants", len(named), len(pb.ErrorReason_name)-1)
}

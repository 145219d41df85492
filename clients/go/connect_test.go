package tokenwire_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/protobuf/reflect/protoreflect"

	tokenwire "github.com/tokenwire/tokenwire/clients/go"
	pb "github.com/tokenwire/tokenwire/clients/go/tokenwire/v1"
	"github.com/tokenwire/tokenwire/clients/go/tokenwiretest"
)

const secret = "tw-secret-token"

func TestTheEnvironmentFillsInWhatIsNotGiven(t *testing.T) {
	gateway := tokenwiretest.NewGateway(t)
	t.Setenv("TOKENWIRE_TARGET", gateway.Target)
	t.Setenv("TOKENWIRE_TOKEN", secret)
	for _, one := range []struct {
		options  []tokenwire.Option
		expected []string
	}{
		{nil, []string{"Bearer " + secret}},
		{[]tokenwire.Option{tokenwire.WithToken("own")}, []string{"Bearer own"}},
		{[]tokenwire.Option{tokenwire.WithToken("")}, nil},
	} {
		gateway.Reply(tokenwiretest.Text("ok"))
		client := must[*tokenwire.Client](t)(tokenwire.New("", one.options...))
		must[*tokenwire.Reply](t)(client.Chat(ctx, hi))
		client.Close()
		calls := gateway.Calls()
		got := calls[len(calls)-1].Metadata.Get("authorization")
		equal(t, "authorization", strings.Join(got, "|"), strings.Join(one.expected, "|"))
	}
	t.Setenv("TOKENWIRE_TOKEN", secret+"\n")
	_, err := tokenwire.New("")
	if err == nil || !strings.Contains(err.Error(), "TOKENWIRE_TOKEN") || strings.Contains(err.Error(), secret) {
		t.Errorf("got %v", err)
	}
}

func TestTargetsThatAreNone(t *testing.T) {
	for _, target := range []string{"http://a:1", "https://a", "grpc://a:1", "grpcs://a:1"} {
		if _, err := tokenwire.New(target); err == nil || !strings.Contains(err.Error(), "target: expected HOST:PORT") {
			t.Errorf("%s: got %v", target, err)
		}
	}
	for _, target := range []string{"dns:///gateway:50051", "unix:///run/tokenwire.sock", "[::1]:50051"} {
		must[*tokenwire.Client](t)(tokenwire.New(target)).Close()
	}
}

func TestATokenNoHeaderCanCarryIsNotRepeatedInTheError(t *testing.T) {
	gateway, _ := started(t)
	for _, token := range []string{secret + "\n", " " + secret, secret + "é", secret + "\x00", secret + "\x7f"} {
		_, err := tokenwire.New(gateway.Target, tokenwire.WithToken(token))
		client := gateway.Client(t, tokenwire.WithTokenSource(func(context.Context) (string, error) { return token, nil }))
		_, supplied := client.Chat(ctx, hi)
		_, streamed := client.Stream(ctx, hi).Reply()
		equal(t, "code", failure(t, supplied).Code, codes.Unauthenticated)
		for _, err := range []error{err, supplied, streamed} {
			if err == nil || !strings.Contains(err.Error(), "token: holds a space") || strings.Contains(err.Error(), secret) {
				t.Errorf("got %v", err)
			}
		}
	}
	equal(t, "calls that were made", len(gateway.Calls()), 0)
}

func TestATokenSourceIsAskedOncePerCall(t *testing.T) {
	asked := 0
	gateway, client := started(t, tokenwire.WithTokenSource(func(ctx context.Context) (string, error) {
		asked++
		if asked == 4 {
			return "", errNoToken
		}
		return "token-" + string(rune('0'+asked)), ctx.Err()
	}))
	// A retry is the same call.
	gateway.Fail(tokenwiretest.Failure{Reason: tokenwire.ReasonGatewayDraining}).Reply(tokenwiretest.Text("ok"))
	gateway.Reply(tokenwiretest.Text("ok"))
	must[*tokenwire.Reply](t)(client.Chat(ctx, hi))
	must[*tokenwire.Reply](t)(client.Stream(ctx, hi).Reply())
	must[[]tokenwire.Model](t)(client.Models(ctx))
	var got []string
	for _, call := range gateway.Calls() {
		got = append(got, call.Metadata.Get("authorization")...)
	}
	equal(t, "tokens", strings.Join(got, "|"), "Bearer token-1|Bearer token-1|Bearer token-2|Bearer token-3")

	_, err := client.Chat(ctx, hi)
	failed := failure(t, err)
	equal(t, "code", failed.Code, codes.Unauthenticated)
	if !errors.Is(err, errNoToken) || failed.RequestID == "" {
		t.Errorf("got %v", err)
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	_, err = client.Chat(ended, hi)
	equal(t, "a source that gives up with the call", errors.Is(err, context.Canceled), true)
	if _, err := tokenwire.New("a:1", tokenwire.WithTokenSource(nil)); err == nil {
		t.Error("no source is no mistake?")
	}
}

var errNoToken = errors.New("the vault is closed")

func TestCredentialsOfTheCallItselfWin(t *testing.T) {
	gateway, client := started(t, tokenwire.WithToken("mine"))
	gateway.Reply(tokenwiretest.Text("ok"))
	must[*tokenwire.Reply](t)(client.Chat(metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer theirs"), hi))
	equal(t, "authorization", strings.Join(gateway.Calls()[0].Metadata.Get("authorization"), "|"), "Bearer theirs")
}

func TestEveryMethodOfTheContractRetriesWhatNoGatewayHasAnswered(t *testing.T) {
	var config struct {
		LoadBalancingConfig []map[string]any
		RetryThrottling     struct{ MaxTokens, TokenRatio float64 }
		MethodConfig        []struct {
			Name        []struct{ Service, Method string }
			RetryPolicy struct {
				MaxAttempts                int
				InitialBackoff, MaxBackoff string
				RetryableStatusCodes       []string
			}
		}
	}
	if err := json.Unmarshal([]byte(tokenwire.ServiceConfig()), &config); err != nil {
		t.Fatal(err)
	}
	listed := map[string]bool{}
	for _, name := range config.MethodConfig[0].Name {
		listed[name.Service+"/"+name.Method] = true
	}
	methods := 0
	for _, file := range []protoreflect.FileDescriptor{
		pb.File_tokenwire_v1_chat_service_proto, pb.File_tokenwire_v1_tokenizer_service_proto,
		pb.File_tokenwire_v1_model_service_proto,
	} {
		for i := range file.Services().Len() {
			service := file.Services().Get(i)
			for j := range service.Methods().Len() {
				methods++
				if name := string(service.FullName()) + "/" + string(service.Methods().Get(j).Name()); !listed[name] {
					t.Errorf("%s is not retried", name)
				}
			}
		}
	}
	policy := config.MethodConfig[0].RetryPolicy
	equal(t, "methods", len(listed), methods)
	equal(t, "codes", strings.Join(policy.RetryableStatusCodes, " "), "UNAVAILABLE CANCELLED")
	equal(t, "attempts", policy.MaxAttempts, 3)
	equal(t, "backoff", policy.InitialBackoff+" "+policy.MaxBackoff, "0.2s 5s")
	equal(t, "throttling", config.RetryThrottling.MaxTokens, 100)
	equal(t, "throttling", config.RetryThrottling.TokenRatio, 0.1)
	if _, ok := config.LoadBalancingConfig[0]["round_robin"]; !ok {
		t.Errorf("balancing: %v", config.LoadBalancingConfig)
	}
}

// named returns a client of a name that stands for the targets, and comes with a service config.
func named(t *testing.T, config string, targets ...string) *tokenwire.Client {
	names := manual.NewBuilderWithScheme("named")
	names.BuildCallback = func(_ resolver.Target, conn resolver.ClientConn, _ resolver.BuildOptions) {
		state := resolver.State{ServiceConfig: conn.ParseServiceConfig(config)}
		for _, target := range targets {
			state.Addresses = append(state.Addresses, resolver.Address{Addr: target})
		}
		names.InitialState(state)
	}
	client := must[*tokenwire.Client](t)(tokenwire.New("named:///gateway",
		tokenwire.WithDialOptions(grpc.WithResolvers(names))))
	t.Cleanup(func() { client.Close() })
	return client
}

func TestReplicasTakeTurns(t *testing.T) {
	t.Parallel()
	one, two := tokenwiretest.NewGateway(t), tokenwiretest.NewGateway(t)
	client := named(t, "{}", one.Target, two.Target)
	for end := time.Now().Add(20 * time.Second); len(one.Calls()) < 3 || len(two.Calls()) < 3; {
		if time.Now().After(end) {
			t.Fatalf("got %d and %d calls", len(one.Calls()), len(two.Calls()))
		}
		must[[]tokenwire.Model](t)(client.Models(ctx))
	}
	one.Close()
	for range 10 { // what is gone fails no call
		must[[]tokenwire.Model](t)(client.Models(ctx))
	}
}

func TestANameDoesNotDecideWhatIsRetried(t *testing.T) {
	t.Parallel()
	gateway := tokenwiretest.NewGateway(t)
	gateway.Fail(tokenwiretest.Failure{Reason: tokenwire.ReasonGatewayDraining}).Reply(tokenwiretest.Text("ok"))
	client := named(t, "{}", gateway.Target)
	equal(t, "text", must[*tokenwire.Reply](t)(client.Chat(ctx, hi)).Text(), "ok")
}

func TestDeadlines(t *testing.T) {
	var seen time.Duration
	spy := tokenwire.WithDialOptions(
		grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, in, out any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
			seen = left(ctx)
			return invoke(ctx, method, in, out, conn, options...)
		}),
		grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer, options ...grpc.CallOption) (grpc.ClientStream, error) {
			seen = left(ctx)
			return open(ctx, desc, conn, method, options...)
		}),
	)
	gateway, client := started(t, spy)
	within := func(what string, expected time.Duration) {
		t.Helper()
		if seen > expected || seen < expected-10*time.Second {
			t.Errorf("%s: got %v, expected %v", what, seen, expected)
		}
	}
	soon, cancel := context.WithTimeout(ctx, 50*time.Second)
	defer cancel()
	for range 5 {
		gateway.Reply(tokenwiretest.Text("ok"))
	}
	must[*tokenwire.Reply](t)(client.Chat(ctx, hi))
	within("chat", tokenwire.DefaultTimeout)
	must[*tokenwire.Reply](t)(client.Chat(soon, hi))
	within("chat with a deadline", 50*time.Second)
	late, cancel := context.WithTimeout(ctx, 2*tokenwire.DefaultTimeout)
	defer cancel()
	must[[]tokenwire.Model](t)(client.Models(late))
	within("models with a later deadline", 2*tokenwire.DefaultTimeout)
	must[[]tokenwire.Model](t)(client.Models(ctx))
	within("models", tokenwire.DefaultTimeout)
	// A stream shows that it lives, so it may live as long as it likes.
	must[*tokenwire.Reply](t)(client.Stream(ctx, hi).Reply())
	equal(t, "stream", seen, -1)
	must[*tokenwire.Reply](t)(client.Stream(soon, hi).Reply())
	within("stream with a deadline", 50*time.Second)
	must[[]tokenwire.BatchResult](t)(client.BatchOrdered(ctx, []tokenwire.Request{hi}))
	equal(t, "batch", seen, -1)

	must[tokenwire.TokenCount](t)(gateway.Client(t, spy, tokenwire.WithTimeout(100*time.Second)).CountTokens(ctx, "m", "a"))
	within("an own timeout", 100*time.Second)
	must[tokenwire.TokenCount](t)(gateway.Client(t, spy, tokenwire.WithTimeout(0)).CountTokens(ctx, "m", "a"))
	equal(t, "no timeout", seen, -1)
	if _, err := tokenwire.New("a:1", tokenwire.WithTimeout(-1)); err == nil {
		t.Error("a timeout below 0 is no mistake?")
	}
}

func left(ctx context.Context) time.Duration {
	deadline, ok := ctx.Deadline()
	if !ok {
		return -1
	}
	return time.Until(deadline)
}

func TestDialOptionsOfTheCallerWin(t *testing.T) {
	gateway, client := started(t, tokenwire.WithDialOptions(
		grpc.WithDefaultServiceConfig("{}"), grpc.WithUserAgent("mine/1"),
	))
	gateway.Fail(tokenwiretest.Failure{Reason: tokenwire.ReasonGatewayDraining})
	_, err := client.Chat(ctx, hi)
	equal(t, "reason", failure(t, err).Reason, tokenwire.ReasonGatewayDraining)
	equal(t, "calls", len(gateway.Calls()), 1)
	if agent := gateway.Calls()[0].Metadata.Get("user-agent")[0]; !strings.HasPrefix(agent, "mine/1 ") {
		t.Errorf("user agent: %q", agent)
	}
}

func TestTLS(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	ca := authority(t, folder, "ca")
	ca.issue(t, "gateway")
	ca.issue(t, "me")
	stranger := authority(t, folder, "stranger")
	stranger.issue(t, "them")
	file := func(name string) string { return filepath.Join(folder, name) }
	pair := must[tls.Certificate](t)(tls.LoadX509KeyPair(file("gateway.pem"), file("gateway.key")))
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(must[[]byte](t)(os.ReadFile(file("ca.pem"))))

	for _, one := range []struct {
		name    string
		mutual  bool
		options []tokenwire.Option
		ok      bool
	}{
		{"trusted", false, []tokenwire.Option{tokenwire.WithCAFile(file("ca.pem"))}, true},
		{"config", false, []tokenwire.Option{tokenwire.WithTLS(&tls.Config{RootCAs: pool})}, true},
		{"untrusted", false, []tokenwire.Option{tokenwire.WithCAFile(file("stranger.pem"))}, false},
		{"the system's", false, []tokenwire.Option{tokenwire.WithTLS(nil)}, false},
		{"plaintext", false, nil, false},
		{"mutual", true, []tokenwire.Option{
			tokenwire.WithCAFile(file("ca.pem")), tokenwire.WithCertificateFiles(file("me.pem"), file("me.key")),
		}, true},
		{"file, then config", true, []tokenwire.Option{
			tokenwire.WithCAFile(file("ca.pem")), tokenwire.WithCertificateFiles(file("me.pem"), file("me.key")),
			tokenwire.WithTLS(&tls.Config{MinVersion: tls.VersionTLS13}),
		}, true},
		{"config, then file", true, []tokenwire.Option{
			tokenwire.WithTLS(&tls.Config{MinVersion: tls.VersionTLS13}),
			tokenwire.WithCAFile(file("ca.pem")), tokenwire.WithCertificateFiles(file("me.pem"), file("me.key")),
		}, true},
		{"mutual without", true, []tokenwire.Option{tokenwire.WithCAFile(file("ca.pem"))}, false},
		{"mutual by a stranger", true, []tokenwire.Option{
			tokenwire.WithCAFile(file("ca.pem")), tokenwire.WithCertificateFiles(file("them.pem"), file("them.key")),
		}, false},
	} {
		t.Run(one.name, func(t *testing.T) {
			t.Parallel()
			config := &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: pool}
			if one.mutual {
				config.ClientAuth = tls.RequireAndVerifyClientCert
			}
			gateway := tokenwiretest.NewGateway(t,
				tokenwiretest.WithToken(secret),
				tokenwiretest.WithServerOptions(grpc.Creds(credentials.NewTLS(config))))
			gateway.Reply(tokenwiretest.Text("ok"))
			reply, err := gateway.Client(t, one.options...).Chat(ctx, hi)
			if one.ok {
				equal(t, "text", must[*tokenwire.Reply](t)(reply, err).Text(), "ok")
				return
			}
			failed := failure(t, err)
			equal(t, "code", failed.Code, codes.Unavailable)
			equal(t, "reason", failed.Reason, "")
		})
	}

	os.WriteFile(file("empty.pem"), nil, 0o600)
	for _, option := range []tokenwire.Option{
		tokenwire.WithCAFile(file("missing.pem")), tokenwire.WithCAFile(file("empty.pem")),
		tokenwire.WithCertificateFiles(file("missing.pem"), file("me.key")),
	} {
		if _, err := tokenwire.New("a:1", option); err == nil || !strings.HasPrefix(err.Error(), "tokenwire: ") {
			t.Errorf("got %v", err)
		}
	}
}

// signer is an authority with its files in a folder.
type signer struct {
	folder      string
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func authority(t *testing.T, folder, name string) *signer {
	s := &signer{folder: folder}
	s.key = must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der := must[[]byte](t)(x509.CreateCertificate(rand.Reader, template, template, &s.key.PublicKey, s.key))
	s.certificate = must[*x509.Certificate](t)(x509.ParseCertificate(der))
	s.write(t, name+".pem", "CERTIFICATE", der)
	return s
}

func (s *signer) issue(t *testing.T, name string) {
	key := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der := must[[]byte](t)(x509.CreateCertificate(rand.Reader, template, s.certificate, &key.PublicKey, s.key))
	s.write(t, name+".pem", "CERTIFICATE", der)
	s.write(t, name+".key", "PRIVATE KEY", must[[]byte](t)(x509.MarshalPKCS8PrivateKey(key)))
}

func (s *signer) write(t *testing.T, name, kind string, der []byte) {
	text := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	if err := os.WriteFile(filepath.Join(s.folder, name), text, 0o600); err != nil {
		t.Fatal(err)
	}
}

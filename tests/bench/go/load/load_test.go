package main

import (
	"bufio"
	"math/rand"
	"net"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	contract "github.com/tokenwire/tokenwire/clients/go/tokenwire/v1"
	"github.com/tokenwire/tokenwire/tests/bench/go/answer"
)

func TestQuantilesAreWithinThreePercent(t *testing.T) {
	var histogram Histogram
	var all []time.Duration
	random := rand.New(rand.NewSource(1))
	for range 100_000 {
		d := time.Duration(random.ExpFloat64() * float64(3*time.Millisecond))
		histogram.Add(d)
		all = append(all, d)
	}
	slices.Sort(all)
	for _, share := range []float64{0.01, 0.5, 0.99, 0.999} {
		exact := all[int(share*float64(len(all)))]
		if got := histogram.Quantile(share); got > exact || float64(got) < 0.965*float64(exact) {
			t.Errorf("%g: %v, not %v", share, got, exact)
		}
	}
	if histogram.Quantile(1) != all[len(all)-1] || new(Histogram).Quantile(0.5) != 0 {
		t.Error("the ends")
	}
}

func TestAWrongAnswerIsNotTakenForOK(t *testing.T) {
	plan, _ := answer.Parse("bench-n3")
	whole, _ := plan.Text()
	for name, bad := range map[string]struct {
		texts   []string
		ordered bool
	}{
		"cut":        {[]string{whole[:5]}, true},
		"twice":      {[]string{whole, whole}, true},
		"altered":    {[]string{strings.ToUpper(whole)}, true},
		"lost":       {[]string{whole[:4], whole[5:]}, true},
		"no trailer": {[]string{whole}, false},
	} {
		want := expect(plan, true)
		r := &receipt{results: newResults(), expected: &want}
		for _, text := range bad.texts {
			r.message(text, time.Now())
		}
		r.ordered = bad.ordered
		if status, err := okIfWhole(r); status != "WRONG" || err == nil {
			t.Errorf("%s: %s", name, status)
		}
	}
}

func TestAnyCutOfTheTextIsRight(t *testing.T) {
	for _, model := range []string{"bench-n40", "bench-n40-t1", "bench-n9-r10"} {
		plan, _ := answer.Parse(model)
		text, _ := plan.Text()
		if plan.Paced() {
			text = ""
			for range plan.Chunks {
				text += string(answer.Stamp(nil, time.Now()))
			}
		}
		for step := 1; step < 50; step++ {
			want := expect(plan, true)
			r := &receipt{results: newResults(), expected: &want, ordered: true}
			for rest := text; rest != ""; rest = rest[min(step, len(rest)):] {
				r.message(rest[:min(step, len(rest))], time.Now())
			}
			if status, err := okIfWhole(r); status != ok || r.results.tokens != int64(plan.Chunks) {
				t.Fatalf("%s in pieces of %d: %s %v", model, step, status, err)
			}
		}
	}
}

// start runs one of the other programs; where it listens.
func start(t *testing.T, program string, arguments ...string) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), program)
	if out, err := exec.Command("go", "build", "-o", binary, "../"+program).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	command := exec.Command(binary, append([]string{"127.0.0.1:0"}, arguments...)...)
	out, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { command.Process.Kill(); command.Wait() })
	address, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(address)
}

func call(t *testing.T, arguments ...string) map[string]any {
	t.Helper()
	o, err := parse(append(arguments, "-limit", "10s", "-seconds", "10s"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := run(o)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestTheMockAndTheRelayAnswerByEveryPlan(t *testing.T) {
	mock := start(t, "mock")
	relay := start(t, "relay", "http://"+mock+"/v1", "sk-9")
	for _, where := range [][]string{
		{"-http", "http://" + mock + "/v1/chat/completions", "-connections", "3"},
		{"-grpc", relay, "-streams", "3"},
	} {
		for model, tokens := range map[string]int64{
			"bench-n16": 160, "bench-n2000": 20000, "bench-n12-t1": 120, "bench-n5-r100": 50, "bench-n2-d20": 20,
		} {
			got := call(t, append(where, "-model", model, "-stream", "-requests", "10")...)
			if !reflect.DeepEqual(got["status"], map[string]int{ok: 10}) || got["tokens"] != tokens {
				t.Errorf("%v %s: %v", where, model, got)
			}
			got = call(t, append(where, "-model", model, "-requests", "10", "-prompt-bytes", "100000")...)
			if !reflect.DeepEqual(got["status"], map[string]int{ok: 10}) {
				t.Errorf("%v %s unary: %v", where, model, got)
			}
		}
	}
}

func TestLimitedKeysAndUnknownPlansAreErrors(t *testing.T) {
	mock := "http://" + start(t, "mock") + "/v1/chat/completions"
	for key, status := range map[string]string{"sk-2": "429", "sk-3": ok} {
		got := call(t, "-http", mock, "-model", "bench-e30", "-requests", "2", "-header", "Authorization=Bearer "+key)
		if !reflect.DeepEqual(got["status"], map[string]int{status: 2}) {
			t.Errorf("%s: %v", key, got)
		}
	}
	// The generator takes no such plan itself; the mock is asked as a peer would that renames models.
	o, _ := parse([]string{"-http", mock, "-requests", "1"})
	o.model = "bench-z1"
	if got, err := run(o); err != nil || !reflect.DeepEqual(got["status"], map[string]int{"400": 1}) {
		t.Errorf("%v %v", got, err)
	}
}

func TestAnOpenLoopKeepsItsRateAndSaysWhatItMissed(t *testing.T) {
	mock := "http://" + start(t, "mock") + "/v1/chat/completions"
	got := call(t, "-http", mock, "-model", "bench-d200", "-rate", "50", "-requests", "20", "-connections", "2")
	if got["issued"].(int)+got["missed"].(int) != 20 || got["missed"].(int) == 0 || got["peak"] != 2 {
		t.Errorf("%v", got)
	}
}

// stalls sends nothing until it is closed: not even a status when the deadline passes, which could
// be there before the caller's own.
type stalls struct {
	contract.UnimplementedChatServiceServer
	closed chan struct{}
}

func (s stalls) StreamChat(*contract.StreamChatRequest, grpc.ServerStreamingServer[contract.StreamChatResponse]) error {
	<-s.closed
	return nil
}

func TestTheLimitEndsWhatStalls(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	closed := make(chan struct{})
	contract.RegisterChatServiceServer(server, stalls{closed: closed})
	go server.Serve(listener)
	defer server.Stop()
	defer close(closed)
	o, _ := parse([]string{"-grpc", listener.Addr().String(), "-stream", "-streams", "3", "-requests", "3", "-limit", "200ms"})
	got, err := run(o)
	if err != nil || !reflect.DeepEqual(got["status"], map[string]int{"DEADLINE_EXCEEDED": 3}) {
		t.Errorf("%v %v", got, err)
	}
}

func TestArgumentsAreChecked(t *testing.T) {
	for _, wrong := range [][]string{
		{}, {"-grpc", "a", "-http", "b"}, {"-grpc", "a", "-model", "bench-q1"}, {"-grpc", "a", "-header", "x"},
		{"-http", "a", "-streams", "2"},
	} {
		if _, err := parse(wrong); err == nil {
			t.Errorf("%v is taken", wrong)
		}
	}
}

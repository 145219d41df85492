package main

import (
	"context"
	"strings"
	"testing"

	"github.com/tokenwire/tokenwire/clients/go/tokenwiretest"
)

func TestAsk(t *testing.T) {
	gateway := tokenwiretest.NewGateway(t)
	gateway.Reply(tokenwiretest.ToolCalls(
		tokenwiretest.Call{Name: "weather", Arguments: `{"city": "Rome"}`},
		tokenwiretest.Call{Name: "weather", Arguments: `{"ci`},
		tokenwiretest.Call{Name: "cities", Arguments: ""},
		tokenwiretest.Call{Name: "fly", Arguments: "{}"},
	)).Reply(tokenwiretest.Text("In Rome."))
	var out strings.Builder
	if err := ask(context.Background(), gateway.Client(t), "m", &out); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(out.String(), "\n")
	if lines[1] != `[weather {"city": "Rome"} -> 21]` || lines[len(lines)-2] != "In Rome." {
		t.Errorf("printed %q", out.String())
	}
	var told []string
	for _, message := range gateway.Calls()[1].Chat().GetMessages()[2:] {
		told = append(told, message.GetContent())
	}
	if told[0] != "21" || !strings.Contains(told[1], "unexpected end of JSON") || told[2] != `["Oslo","Rome"]` || told[3] != `"no such tool: fly"` {
		t.Errorf("told %q", told)
	}
}

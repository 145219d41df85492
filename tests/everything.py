"""One request that uses every field of the contract, for every dialect to encode."""

from __future__ import annotations

from tokenwire.v1 import chat_pb2, chat_service_pb2

Chat = chat_service_pb2.ChatRequest
Params = chat_pb2.GenerationParams
Template = chat_pb2.RoleTemplate
ToolChoice = chat_pb2.ToolChoice


def everything() -> Chat:
    """What an upstream does not take of it may be dropped."""
    chat = Chat(
        model="alias",
        params=Params(
            temperature=0.7,
            top_p=0.9,
            top_k=40,
            min_p=0.05,
            max_completion_tokens=5000,  # above the cap
            stop=["###", "</s>"],
            frequency_penalty=-0.5,
            presence_penalty=0.0,
            repetition_penalty=1.1,
            seed=-(2**63),
            choice_count=2,
            logprobs=True,
            top_logprobs=5,
            logit_bias={50256: 1.5, 7: -100},
            reasoning_effort="high",
            enable_thinking=False,
            verbosity="low",
            parallel_tool_calls=True,
        ),
        tool_choice=ToolChoice(mode=ToolChoice.MODE_REQUIRED, tool_names=["lookup", "shell"]),
        response_format=chat_pb2.ResponseFormat(
            json_schema=chat_pb2.JsonSchemaFormat(
                name="answer",
                schema_json='{"type": "object", "required": ["z", "a"]}',
                description="The answer.",
                strict=False,
            )
        ),
        role_templates=[
            Template(role="system", begin="<sys>", end="</sys>"),
            Template(role="environment", api_role="system", begin="<env>", end="</env>"),
            Template(role="observer", fallback_role="environment"),
            Template(role="user", begin="[user] ", end="."),
        ],
        end_user_id="end-user-1",
        prompt_cache_key="bucket",
        service_tier="flex",
        unsupported_parameter_policy=chat_service_pb2.UNSUPPORTED_PARAMETER_POLICY_DROP,
        labels={"team": "a"},  # for accounting here: not for the upstream
        extra_body_json=(
            '{"chat_template_kwargs": {"big": 9007199254740993, "half": 0.10}, '
            '"stream_options": {"vendor": 1}}'
        ),
    )
    say = chat.messages.add
    say(role="system", content="Be terse.")
    say(role="observer", content="Today is Monday.")
    say(role="developer", content="No jokes.", name="ops")
    picture = say(role="user").parts
    picture.add(text="What is this?", extra_json='{"cache_control": {"type": "ephemeral"}}')
    picture.add(image=chat_pb2.Media(data=b"\x89PNG", media_type="image/png", detail="high"))
    picture.add(image=chat_pb2.Media(url="https://example.com/i.png"))
    picture.add(audio=chat_pb2.Media(data=b"RIFF", media_type="audio/x-wav"))
    picture.add(audio=chat_pb2.Media(url="https://example.com/a.mp3"))
    picture.add(video=chat_pb2.Media(url="https://example.com/v.mp4"))
    picture.add(file=chat_pb2.Media(data=b"%PDF", media_type="application/pdf", filename="d.pdf"))
    picture.add(file=chat_pb2.Media(file_id="file-7", filename="e.pdf"))
    picture.add(raw_json='{"z": 9007199254740993, "type": "vendor", "a": 1.10}')
    asked = say(role="assistant", reasoning="I should look it up.", refusal="not that one")
    asked.annotations.add(  # came with an earlier answer: upstreams do not take them back
        start_offset=1, end_offset=2, url="https://example.com", title="t"
    )
    asked.tool_calls.add(
        id="call-1",
        function=chat_pb2.FunctionCall(name="lookup", arguments_json='{"q": "x", "n": 1.0'),
    )
    asked.tool_calls.add(id="call-2", custom=chat_pb2.CustomCall(name="shell", input="ls -l\n"))
    say(role="tool", content="found", tool_call_id="call-1")
    say(role="assistant", content="Here.", extra_json='{"audio":{"id":12345678901234567890123}}')
    chat.tools.add().function.CopyFrom(
        chat_pb2.FunctionTool(
            name="lookup",
            description="Looks up.",
            parameters_schema_json=(
                '{"type": "object", "properties": '
                '{"z": {"maximum": 18446744073709551616}, "a": {}}}'
            ),
            strict=True,
        )
    )
    chat.tools.add().custom.CopyFrom(
        chat_pb2.CustomTool(
            name="shell",
            description="Runs.",
            format_json=(
                '{"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: /.+/"}}'
            ),
        )
    )
    chat.tools.add(raw_json='{"type": "web_search", "b": 1, "a": 1e400}')
    return chat

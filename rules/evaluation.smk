# A trained model's losses over the whole validation split, and its samples.


rule evaluate_model:
    input:
        unpack(inputs_of("evaluate_model")),
    output:
        evaluation="results/evaluations/{experiment}/evaluation.json",
    log:
        "logs/evaluate_model/{experiment}.log",
    benchmark:
        "logs/evaluate_model/{experiment}.tsv"
    conda:
        "../envs/snakegpt.yaml"
    threads: TRAINING_THREADS
    resources:
        mem_mb=4000,
        runtime=120,
        gpu=GPU,
    params:
        settings=settings_of("evaluate_model"),
        code=code_of_stage("evaluate_model"),
        arguments=arguments_of("evaluate_model"),
    shell:
        "python -m snakegpt.run {params.arguments:q} --threads {threads} --log {log:q}"


rule sample_text:
    input:
        unpack(inputs_of("sample_text")),
    output:
        samples="results/samples/{experiment}/samples.jsonl",
    log:
        "logs/sample_text/{experiment}.log",
    benchmark:
        "logs/sample_text/{experiment}.tsv"
    conda:
        "../envs/snakegpt.yaml"
    threads: 2
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=GPU,
    params:
        settings=settings_of("sample_text"),
        code=code_of_stage("sample_text"),
        arguments=arguments_of("sample_text"),
    shell:
        "python -m snakegpt.run {params.arguments:q} --threads {threads} --log {log:q}"

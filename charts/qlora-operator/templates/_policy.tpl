{{- /* CEL for organization policy. */ -}}

{{- /* A list of URIs as a CEL list; {namespace} is the QLoRAJob's. */ -}}
{{- define "qlora-operator.allowed" -}}
{{ toJson . }}.map(uri, uri.replace('{namespace}', object.metadata.namespace))
{{- end -}}

{{- /* For each list of `policy`, the URIs of a QLoRAJob that it restricts, and how to go on. A test compares the fields with the CRD. */ -}}
{{- define "qlora-operator.uriRules" -}}
models:
  fix: use a model from
  used: |-
    [{'field': 'spec.model.uri', 'uri': string(object.spec.model.uri), 'pinned': object.spec.model.uri + '@' + object.spec.model.revision}]
datasets:
  fix: use a dataset from
  {{- /* An entry for a repository is also one for its branches, tags and commits, which are between its name and the file's. */}}
  used: |-
    (object.spec.dataset.?uri.optMap(uri, [{'field': 'spec.dataset.uri', 'uri': string(uri)}]).orValue([])
    + object.spec.dataset.?sources.orValue([]).map(source, {'field': 'spec.dataset.sources[].uri', 'uri': string(source.uri)})
    + object.spec.dataset.?evaluation.?uri.optMap(uri, [{'field': 'spec.dataset.evaluation.uri', 'uri': string(uri)}]).orValue([])
    ).map(used, !used.uri.matches('^hf://datasets/[^/@]+/[^/@]+@[A-Za-z0-9_][A-Za-z0-9._-]*/') || used.uri.matches('(?i)^hf://[^@]*@(refs|pr)/') ? used : {
    'field': used.field, 'uri': used.uri,
    'unpinned': used.uri.substring(0, used.uri.indexOf('@')) + used.uri.substring(used.uri.indexOf('/', used.uri.indexOf('@')))})
outputs:
  fix: choose a prefix below
  used: |-
    [{'field': 'spec.output.uri', 'uri': string(object.spec.output.uri)}]
trackers:
  fix: report to
  {{- /* Without baseUrl, wandb reports to its public server. */}}
  used: |-
    object.spec.?tracking.?wandb.optMap(wandb, [{'field': 'spec.tracking.wandb.baseUrl', 'uri': string(wandb.?baseUrl.orValue('https://api.forge.coreweave.com'))}]).orValue([])
    + object.spec.?tracking.?mlflow.optMap(mlflow, [{'field': 'spec.tracking.mlflow.uri', 'uri': string(mlflow.uri)}]).orValue([])
{{- end -}}

{{- define "qlora-operator.policyBinding" }}
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata:
  name: {{ .name }}
  labels: {{- include "qlora-operator.labels" .root | nindent 4 }}
spec:
  policyName: {{ .name }}
  validationActions: [{{ .root.Values.policy.action }}]
  {{- with .root.Values.policy.namespaceSelector }}
  matchResources:
    namespaceSelector: {{- toYaml . | nindent 6 }}
  {{- end }}
{{- end -}}

{{- /* Policy that refuses the trainer's own image would keep every run from starting. */ -}}
{{- define "qlora-operator.checkImages" -}}
{{- $image := include "qlora-operator.image" (dict "image" .Values.trainerImage "root" .) -}}
{{- $allowed := false -}}
{{- range .Values.policy.images -}}
{{- $rest := trimPrefix . $image -}}
{{- $separator := ternary "^(/.*|[:@][^/]*)$" "^[:@][^/]*$" (regexMatch "[./:]" .) -}}
{{- if or (eq $image .) (hasPrefix . $image | and (or (hasSuffix "/" .) (regexMatch $separator $rest))) -}}
{{- $allowed = true -}}
{{- end -}}
{{- end -}}
{{- if not $allowed -}}
{{- fail (printf "policy.images does not allow %s, the trainer image, so no run could start; add it" $image) -}}
{{- end -}}
{{- end -}}

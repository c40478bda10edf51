{{- /* Rules that several NetworkPolicies share. */ -}}

{{- define "qlora-operator.ports" -}}
{{- range . }}
- {protocol: TCP, port: {{ . }}}
{{- end }}
{{- end -}}

{{- /* Given peers, or everything but link-local addresses, where clouds keep the credentials of the node. */ -}}
{{- define "qlora-operator.peers" -}}
{{- if . -}}
{{ toYaml . }}
{{- else -}}
- ipBlock: {cidr: 0.0.0.0/0, except: [169.254.0.0/16]}
- ipBlock: {cidr: "::/0", except: ["fe80::/10", "fd00:ec2::/32"]}
{{- end -}}
{{- end -}}

{{- /* The port of a URL, as a list of one. */ -}}
{{- define "qlora-operator.portsOf" -}}
{{- $host := (urlParse .).host -}}
{{- if regexMatch ":[0-9]+$" $host -}}
[{{ regexFind "[0-9]+$" $host }}]
{{- else if hasPrefix "http://" . -}}
[80]
{{- else -}}
[443]
{{- end -}}
{{- end -}}

{{- define "qlora-operator.dnsEgress" -}}
- to: {{- toYaml .Values.networkPolicy.dns | nindent 4 }}
  ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
{{- end -}}

{{- define "qlora-operator.runsSelector" -}}
matchExpressions: [{key: qlora.dev/job, operator: Exists}]
{{- end -}}

{{- define "qlora-operator.runsNamespaces" -}}
{{- if .Values.watchNamespaces -}}
matchExpressions: [{key: kubernetes.io/metadata.name, operator: In, values: {{ toJson .Values.watchNamespaces }}}]
{{- else -}}
{}
{{- end -}}
{{- end -}}

{{- /* A rule to where `rule` says, on its ports or on that of `url`. */ -}}
{{- define "qlora-operator.egressTo" -}}
- to: {{- include "qlora-operator.peers" .rule.to | nindent 4 }}
  ports: {{- include "qlora-operator.ports" (.rule.ports | default (include "qlora-operator.portsOf" .url | fromYamlArray)) | trim | nindent 4 }}
{{- end -}}

{{- define "qlora-operator.operatorEgress" -}}
- to:
    - namespaceSelector:
        matchLabels: {kubernetes.io/metadata.name: {{ .Release.Namespace | quote }}}
      podSelector:
        matchLabels: {{- include "qlora-operator.selector" . | nindent 10 }}
  ports: {{- include "qlora-operator.ports" (list 8080) | trim | nindent 4 }}
{{- end -}}
